//! Activation functions, applied to rows.

/// An activation function, element by element unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x`
    #[default]
    Identity,
    /// `x / (1 + e^-x)`, also called swish.
    Silu,
    /// `1 + elu(x)`, positive everywhere.
    Elu1,
    /// `2 + elu(x)`, above 1 everywhere.
    Elu2,
    /// `x` for positive `x`, else `e^x - 1`.
    Elu,
    /// `max(x, 0)`
    Relu,
    /// `x Phi(x)`, the exact form.
    Gelu,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `sin x`
    Sine,
    /// `e^(x - m)` with `m` the largest element of the row.
    Exp,
}

impl Activation {
    /// Reads the names that TransNormerLLM configurations use; any other name means [`Identity`](Self::Identity).
    ///
    /// ```
    /// use linattn::layers::Activation;
    /// assert_eq!(Activation::parse("swish"), Activation::Silu);
    /// assert_eq!(Activation::parse("none"), Activation::Identity);
    /// ```
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name {
            "silu" | "swish" => Self::Silu,
            "1+elu" => Self::Elu1,
            "2+elu" => Self::Elu2,
            "elu" => Self::Elu,
            "relu" => Self::Relu,
            "gelu" => Self::Gelu,
            "sigmoid" => Self::Sigmoid,
            "sine" => Self::Sine,
            "exp" => Self::Exp,
            _ => Self::Identity,
        }
    }
}
