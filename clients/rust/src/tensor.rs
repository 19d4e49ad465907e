//! The numbers of a tensor as `f32`.

use crate::proto::{DType, Tensor};
use half::{bf16, f16};
use std::borrow::Cow;

/// A tensor that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// An element type that this client does not know.
    #[error("a tensor has the unknown element type {0}")]
    ElementType(i32),
    /// The data is longer or shorter than the shape says.
    #[error("a tensor of shape {shape:?} has {n_bytes} bytes of data")]
    Length {
        /// As the message has it.
        shape: Vec<u32>,
        /// As received.
        n_bytes: usize,
    },
}

/// Rows of equal width.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix<'a> {
    /// Row by row.
    pub values: Cow<'a, [f32]>,
    /// Numbers in a row.
    pub n_columns: usize,
}

impl Matrix<'_> {
    /// All rows, in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        // A matrix of no columns has no numbers, and then any width will do.
        self.values.chunks_exact(self.n_columns.max(1))
    }

    /// A copy that outlives the message.
    pub fn into_owned(self) -> Matrix<'static> {
        Matrix { values: Cow::Owned(self.values.into_owned()), n_columns: self.n_columns }
    }

    /// Row `i`; none beyond the last one.
    pub fn row(&self, i: usize) -> Option<&[f32]> {
        self.rows().nth(i)
    }
}

impl Tensor {
    /// The numbers, row-major. F32 is borrowed from the received bytes where they are aligned for it, and copied otherwise;
    /// F16 and BF16 are converted.
    pub fn values(&self) -> Result<Cow<'_, [f32]>, TensorError> {
        let element_type = DType::try_from(self.dtype).map_err(|_| TensorError::ElementType(self.dtype))?;
        let n_element_bytes = match element_type {
            DType::DtypeUnspecified | DType::DtypeF32 => 4,
            DType::DtypeF16 | DType::DtypeBf16 => 2,
        };
        let n_bytes = self.shape.iter().try_fold(n_element_bytes, |n, width| usize::checked_mul(n, *width as usize));
        if n_bytes != Some(self.data.len()) {
            return Err(TensorError::Length { shape: self.shape.clone(), n_bytes: self.data.len() });
        }
        Ok(match element_type {
            DType::DtypeUnspecified | DType::DtypeF32 => f32_values(&self.data),
            DType::DtypeF16 => pairs(&self.data).map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            DType::DtypeBf16 => pairs(&self.data).map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        })
    }

    /// The numbers as rows. The first dimension counts them; a tensor of one dimension has rows of one number.
    pub fn matrix(&self) -> Result<Matrix<'_>, TensorError> {
        let values = self.values()?;
        // The product can overflow where the first dimension is 0.
        let n_columns = self.shape.iter().skip(1).try_fold(1, |n, width| usize::checked_mul(n, *width as usize));
        let Some(n_columns) = n_columns else {
            return Err(TensorError::Length { shape: self.shape.clone(), n_bytes: self.data.len() });
        };
        Ok(Matrix { values, n_columns })
    }
}

fn f32_values(data: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(data) {
        Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
        _ => {
            let quads = data.as_chunks::<4>().0;
            quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect()
        }
    }
}

fn pairs(data: &[u8]) -> impl Iterator<Item = [u8; 2]> {
    data.as_chunks::<2>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, shape: &[u32], data: Vec<u8>) -> Tensor {
        Tensor { dtype: dtype.into(), shape: shape.to_vec(), data: data.into() }
    }

    #[test]
    fn every_element_type_is_read() {
        let numbers = [1.0_f32, -2.5, 0.0, 0.375];
        let f32_bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16_bytes = numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let bf16_bytes = numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        for (dtype, bytes) in
            [(DType::DtypeF32, f32_bytes), (DType::DtypeF16, f16_bytes), (DType::DtypeBf16, bf16_bytes)]
        {
            let tensor = tensor(dtype, &[2, 2], bytes);
            assert_eq!(tensor.values().unwrap(), &numbers[..]);
            let matrix = tensor.matrix().unwrap();
            assert_eq!(matrix.rows().collect::<Vec<_>>(), [&numbers[..2], &numbers[2..]]);
            assert_eq!((matrix.row(1), matrix.row(2)), (Some(&numbers[2..]), None));
        }
    }

    #[test]
    fn f32_is_borrowed_where_it_is_aligned_and_right_where_it_is_not() {
        let numbers = [1.5_f32, -3.0];
        let padded = [&[0_u8; 3][..], bytemuck::cast_slice(&numbers)].concat();
        let aligned_start = (0..4).find(|start| padded[*start..].as_ptr().cast::<f32>().is_aligned()).unwrap();
        let bytes = prost::bytes::Bytes::from(padded);
        let is_borrowed = |tensor: &Tensor| matches!(tensor.values().unwrap(), Cow::Borrowed(_));
        // The numbers start at the fourth byte, which is aligned or not as the allocation has it.
        let tensor = Tensor { dtype: 1, shape: vec![2], data: bytes.slice(3..) };
        assert_eq!(tensor.values().unwrap(), &numbers[..]);
        assert_eq!(is_borrowed(&tensor), aligned_start == 3);
        let other = bytes.slice(aligned_start..aligned_start + 4);
        assert!(is_borrowed(&Tensor { dtype: 1, shape: vec![1], data: other }));
    }

    #[test]
    fn data_that_does_not_fit_the_shape_is_refused() {
        assert_eq!(
            tensor(DType::DtypeF32, &[2, 2], vec![0; 12]).values(),
            Err(TensorError::Length { shape: vec![2, 2], n_bytes: 12 })
        );
        assert!(tensor(DType::DtypeF32, &[u32::MAX, u32::MAX, u32::MAX], vec![]).values().is_err());
        assert!(tensor(DType::DtypeF32, &[u32::MAX, u32::MAX, u32::MAX], vec![]).matrix().is_err());
        assert!(tensor(DType::DtypeF32, &[0, u32::MAX, u32::MAX, u32::MAX], vec![]).matrix().is_err());
        assert_eq!(Tensor { dtype: 9, ..Tensor::default() }.values(), Err(TensorError::ElementType(9)));
        assert_eq!(tensor(DType::DtypeF32, &[0, 0], vec![]).matrix().unwrap().rows().len(), 0);
    }
}
