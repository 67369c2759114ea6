//! The sink that sums the losses of layers.

use candle_core::{Result, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Collects the compression losses, scalars, of layers whose `forward` may only return a tensor. Clones share one
/// collection.
///
/// Give clones of one sink to all layers, run the model, then add [`Self::take`] to the loss.
///
/// A loss with a graph keeps that whole graph alive, activations included, until [`Self::take`]: call it once per
/// forward pass, even if its result is not used. Losses without a graph, as in evaluation, are summed at once, so that
/// a sink that is never emptied stays one scalar.
#[derive(Clone, Debug, Default)]
pub struct CompressionLossSink(Arc<Mutex<Vec<Tensor>>>);

impl CompressionLossSink {
    /// An empty sink.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one layer's loss, a scalar.
    pub fn push(&self, loss: Tensor) {
        let mut losses = self.lock();
        if let Some(last) = losses.last_mut().filter(|last| !last.track_op() && !loss.track_op()) {
            // Losses that do not fit together stay apart, and `take` refuses them.
            if let Ok(sum) = &*last + &loss {
                *last = sum;
                return;
            }
        }
        losses.push(loss)
    }

    /// The sum of the losses pushed since the last call; `None` if there are none.
    ///
    /// # Errors
    /// Losses of different shapes, dtypes or devices.
    pub fn take(&self) -> Result<Option<Tensor>> {
        let mut losses = std::mem::take(&mut *self.lock()).into_iter();
        let Some(first) = losses.next() else { return Ok(None) };
        losses.try_fold(first, |sum, loss| sum + loss).map(Some)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tensor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::CompressionLossSink;
    use candle_core::{DType, Device, Result, Tensor, Var};

    #[test]
    fn a_sink_that_nobody_empties_keeps_one_scalar_and_every_graph() -> Result<()> {
        let (sink, one) = (CompressionLossSink::new(), Tensor::new(1f64, &Device::Cpu)?);
        for _ in 0..1000 {
            sink.push(one.clone());
        }
        assert_eq!(sink.lock().len(), 1);
        let var = Var::from_tensor(&one)?;
        for _ in 0..3 {
            sink.push((var.as_tensor() * 2.0)?);
        }
        assert_eq!(sink.lock().len(), 4);
        let sum = sink.take()?.expect("1003 losses");
        assert_eq!(sum.to_scalar::<f64>()?, 1006.0);
        assert_eq!(
            sum.backward()?.get(&var).expect("three graphs").to_scalar::<f64>()?,
            6.0
        );
        // Losses that do not fit together are refused by `take`, and not lost.
        sink.push(one.clone());
        sink.push(one.to_dtype(DType::F32)?);
        assert!(sink.take().is_err() && sink.take()?.is_none());
        Ok(())
    }
}
