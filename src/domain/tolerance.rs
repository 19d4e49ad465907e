//! How far two computations of the same vector may be from each other.

use serde::Deserialize;

/// How far a vector may be from another one that stands for the same.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// The largest difference of a single value.
    pub absolute: f64,
    /// The cosine must be greater than this.
    pub cosine: f64,
}

impl Tolerance {
    /// What single precision keeps.
    pub const SINGLE_PRECISION: Tolerance = Tolerance { absolute: 1e-4, cosine: 0.99999 };

    /// Whether two vectors with this largest difference and this cosine are within both bounds. NaN never is.
    pub fn holds(&self, absolute: f32, cosine: f64) -> bool {
        f64::from(absolute) <= self.absolute && cosine > self.cosine
    }
}

impl Default for Tolerance {
    fn default() -> Self {
        Tolerance::SINGLE_PRECISION
    }
}
