//! Parquet's hybrid of run lengths and bit-packing, which levels and dictionary indexes are written in.
//!
//! Whatever repeats here repeats in long runs, so that a column costs what its distinct values cost and not what its rows cost.

use bytes::{BufMut, BytesMut};

/// The bits that an index into a dictionary of `n_entries` takes. At least one, because some readers know no width of zero.
pub(super) fn index_width(n_entries: usize) -> u32 {
    let greatest = n_entries.saturating_sub(1);
    (usize::BITS - greatest.leading_zeros()).max(1)
}

/// Appends `n` times `value`, which has at most `width` bits.
pub(super) fn put_run(out: &mut BytesMut, n: usize, value: usize, width: u32) {
    if n > 0 {
        put_varint(out, n << 1);
        out.put_uint_le(value as u64, width.div_ceil(8) as usize);
    }
}

/// Appends the numbers from `first` to `first + n - 1`, `n_times` over, with `width` bits each.
pub(super) fn put_sequences(out: &mut BytesMut, first: usize, n: usize, n_times: usize, width: u32) {
    let n_groups = (n * n_times).div_ceil(8);
    if n_groups == 0 {
        return;
    }
    put_varint(out, n_groups << 1 | 1);
    // Eight sequences end at a whole byte, whatever their length and width.
    let period = pack(&(0..8 * n).map(|i| first + i % n).collect::<Vec<_>>(), width);
    let mut n_missing = n_groups * width as usize;
    while n_missing > 0 {
        let n_bytes = n_missing.min(period.len());
        out.put_slice(&period[..n_bytes]);
        n_missing -= n_bytes;
    }
}

/// Packs values of `width` bits, lowest bits first.
fn pack(values: &[usize], width: u32) -> Vec<u8> {
    let mut packed = Vec::with_capacity((values.len() * width as usize).div_ceil(8));
    let (mut bits, mut n_bits) = (0_u64, 0);
    for value in values {
        bits |= (*value as u64) << n_bits;
        n_bits += width;
        while n_bits >= 8 {
            packed.push(bits as u8);
            bits >>= 8;
            n_bits -= 8;
        }
    }
    if n_bits > 0 {
        packed.push(bits as u8);
    }
    packed
}

/// Appends a number seven bits at a time, lowest first.
fn put_varint(out: &mut BytesMut, mut n: usize) {
    while n > 0x7f {
        out.put_u8(n as u8 | 0x80);
        n >>= 7;
    }
    out.put_u8(n as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_a_length_and_a_value() {
        let mut out = BytesMut::new();
        put_run(&mut out, 0, 1, 1);
        put_run(&mut out, 3, 1, 1);
        put_run(&mut out, 500, 0x0102, 9);
        assert_eq!(out[..], [6, 1, 0xe8, 7, 2, 1]);
    }

    #[test]
    fn an_index_has_the_bits_of_the_greatest_one() {
        assert_eq!([0, 1, 2, 3, 4, 5, 256, 257].map(index_width), [1, 1, 1, 2, 2, 3, 8, 9]);
    }

    /// The example of the format's specification: the numbers from 0 to 7 with three bits each.
    #[test]
    fn sequences_are_packed_as_the_specification_says() {
        let mut out = BytesMut::new();
        put_sequences(&mut out, 0, 8, 1, 3);
        assert_eq!(out[..], [3, 0b1000_1000, 0b1100_0110, 0b1111_1010]);
    }

    #[test]
    fn sequences_of_any_length_and_width_repeat() {
        for (first, n, n_times, width) in [(0, 3, 5, 2), (5, 7, 4, 11), (100, 64, 3, 8), (70_000, 1, 9, 17)] {
            let mut out = BytesMut::new();
            put_sequences(&mut out, first, n, n_times, width);
            let mut packed = &out[1..];
            let mut found = Vec::new();
            let (mut bits, mut n_bits) = (0_u64, 0);
            while found.len() < n * n_times {
                while n_bits < width {
                    bits |= u64::from(packed[0]) << n_bits;
                    packed = &packed[1..];
                    n_bits += 8;
                }
                found.push((bits & ((1 << width) - 1)) as usize);
                bits >>= width;
                n_bits -= width;
            }
            let expected: Vec<usize> = (0..n * n_times).map(|i| first + i % n).collect();
            assert_eq!(found, expected, "{n_times} x {n} from {first} with {width} bits");
        }
    }
}
