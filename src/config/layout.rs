//! The order of the axes that a caller's tensors have.

use candle_core::{Error, Result, Tensor};

/// The order of the axes of query, key, value and output. No entry point can tell the orders apart where there are as
/// many heads as tokens, so the caller names the order. Neither order costs a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TensorLayout {
    /// Query and output (batch, heads, tokens, head_dim), key and value (batch, kv_heads, tokens, head_dim): the order
    /// of PyTorch's `scaled_dot_product_attention`. The default.
    #[default]
    HeadsFirst,
    /// Query and output (batch, tokens, heads, head_dim), key and value (batch, tokens, kv_heads, head_dim): the order
    /// after a projection and `reshape`, and that of flash-attention.
    TokensFirst,
}

impl TensorLayout {
    /// A view with the token and head axes swapped, if this order is not (batch, heads, tokens, head_dim). The same
    /// swap leads back. A tensor of another rank is left unchanged, for the checks to refuse.
    pub(crate) fn turned(self, tensor: &Tensor) -> Result<Tensor> {
        match self {
            Self::TokensFirst if tensor.rank() == 4 => tensor.transpose(1, 2),
            Self::HeadsFirst | Self::TokensFirst => Ok(tensor.clone()),
        }
    }

    /// [`Self::turned`] for query, key and value.
    pub(crate) fn turned_all(self, [q, k, v]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        Ok([self.turned(q)?, self.turned(k)?, self.turned(v)?])
    }

    /// Adds the order to an error that names shapes.
    pub(crate) fn explained<T>(self, result: Result<T>) -> Result<T> {
        match self {
            Self::HeadsFirst => result,
            Self::TokensFirst => result.map_err(|error| {
                let text = error.to_string();
                let line = text.lines().next().unwrap_or_default();
                Error::msg(format!(
                    "{line} (shapes as (batch, heads, tokens, head_dim), of tensors given in TensorLayout::TokensFirst)"
                ))
                .bt()
            }),
        }
    }
}
