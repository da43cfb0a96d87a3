//! What goes into the backward pass of a recurrence, and what comes out.

use crate::tensor::{View, ViewMut};

/// What went into a call, and the gradient of what came out.
#[derive(Debug)]
pub struct Inputs<'a, E, S> {
    /// `[batch, lq, heads, dk]`
    pub q: View<'a, E, 4>,
    /// `[batch, lk, heads, dk]`
    pub k: View<'a, E, 4>,
    /// `[batch, lk, heads, dv]`
    pub v: View<'a, E, 4>,
    /// The state before the first token; zero if there is none.
    pub state: Option<&'a S>,
    /// Gradient of the output, `[batch, lq, heads, dv]`.
    pub dout: View<'a, E, 4>,
}

impl<E: Copy, S> Clone for Inputs<'_, E, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E: Copy, S> Copy for Inputs<'_, E, S> {}

/// Where the gradients of the inputs go. They are overwritten.
#[derive(Debug)]
pub struct Gradients<'a, E, S> {
    /// As `q`.
    pub q: ViewMut<'a, E, 4>,
    /// As `k`.
    pub k: ViewMut<'a, E, 4>,
    /// As `v`.
    pub v: ViewMut<'a, E, 4>,
    /// Holds the gradient of the final state before, and that of the initial one after. Without it the gradient of
    /// the final state is zero.
    pub state: Option<&'a mut S>,
}
