//! Vector math, written once over [`Lanes`].
