//! prost's codec with two changes.
//!
//! Bytes that are not a valid message are the caller's fault: tonic's own codec answers INTERNAL, which would page our
//! operators for a client's bug. And the entries of a message are counted before it is decoded: an empty item takes two
//! bytes on the wire and 168 in memory, so a message within its size limit could still need gigabytes.

use prost::{
    Message,
    bytes::Buf,
    encoding::{DecodeContext, decode_key, skip_field},
};
use tonic::{
    Code, Status,
    codec::{BufferSettings, Codec as TonicCodec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Encodes `T`, decodes `U`.
#[derive(Debug)]
pub struct Codec<T, U> {
    inner: ProstCodec<T, U>,
}

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Codec { inner: ProstCodec::default() }
    }
}

impl<T, U> TonicCodec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CheckedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        self.inner.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder { inner: self.inner.decoder() }
    }
}

/// Decodes `U`, or fails with INVALID_ARGUMENT.
#[derive(Debug)]
pub struct CheckedDecoder<U> {
    inner: ProstDecoder<U>,
}

impl<U: Message + Default> Decoder for CheckedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        check_entries(buffer.chunk())?;
        self.inner.decode(buffer).map_err(|status| match status.code() {
            Code::Internal => Status::invalid_argument(format!("request: {}", status.message())),
            _ => status,
        })
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.inner.buffer_settings()
    }
}

/// Twice the largest sum that `limits.max_candidates` and `limits.max_history` can have.
const MAX_ENTRIES: usize = 400_000;

/// Counts a message's top-level fields without decoding them. tonic passes a message in one contiguous buffer.
fn check_entries(mut message: &[u8]) -> Result<(), Status> {
    let mut n_entries = 0;
    while message.has_remaining() {
        let skipped = decode_key(&mut message)
            .and_then(|(tag, wire_type)| skip_field(wire_type, tag, &mut message, DecodeContext::default()));
        if skipped.is_err() {
            // Not a valid message: the decoder reports that.
            return Ok(());
        }
        n_entries += 1;
        if n_entries > MAX_ENTRIES {
            return Err(Status::invalid_argument(format!("request: more than {MAX_ENTRIES} entries")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proto::{GetMidEmbRequest, Item};

    #[test]
    fn only_a_message_with_too_many_entries_is_refused() {
        let page = |n| GetMidEmbRequest { candidates: vec![Item::default(); n], ..Default::default() }.encode_to_vec();
        assert!(check_entries(&page(1000)).is_ok());
        assert!(check_entries(&page(MAX_ENTRIES)).is_ok());
        let status = check_entries(&page(MAX_ENTRIES + 1)).unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "request: more than 400000 entries"));
        assert!(check_entries(&[0x0a, 0xff, 0xff]).is_ok(), "left to the decoder");
        assert!(check_entries(&[]).is_ok());
    }
}
