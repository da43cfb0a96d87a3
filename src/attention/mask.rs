//! Which keys a query sees by its position.

/// Which keys query `i` of `lq` sees among `lk` keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mask {
    /// All.
    #[default]
    Full,
    /// Keys `j <= i`: both sequences begin together.
    Causal,
    /// Keys `j <= i + lk - lq`: both sequences end together, as in decoding with a cache. The first queries see
    /// nothing if there are more queries than keys.
    CausalEnd,
    /// Keys `j <= i + offset`.
    CausalOffset(isize),
}

impl Mask {
    /// The offset of the diagonal; none if everything is seen.
    pub(crate) fn offset(self, lq: usize, lk: usize) -> Option<isize> {
        // Lengths of arrays that exist fit in isize; those of repeated rows may not, and are cut.
        let int = |n: usize| isize::try_from(n).unwrap_or(isize::MAX);
        match self {
            Mask::Full => None,
            Mask::Causal => Some(0),
            Mask::CausalEnd => Some(int(lk) - int(lq)),
            Mask::CausalOffset(offset) => Some(offset),
        }
    }
}
