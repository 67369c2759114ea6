//! One call: a session's next layer, or dense attention.

use candle_core::{bail, DType, Device, Result, Tensor};
use candle_sfattention::session::attend_next_layer;
use candle_sfattention::{
    attend, AttentionOptions, CompressionConfig, HeadStrategies, MergePlan, MergeStrategy, TensorLayout,
};

/// The settings of one call.
#[derive(Clone, Copy, Default)]
pub(crate) struct Call<'a> {
    pub scale: f32,
    /// ALiBi slopes, (H) or (B, H).
    pub slopes: Option<&'a Tensor>,
    /// Tokens before a row's own that it sees; None for all.
    pub left: Option<usize>,
    /// Tokens after a row's own that it sees; None for all.
    pub right: Option<usize>,
    /// 0 is none.
    pub softcap: Option<f32>,
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Lens {
    heads: usize,
    queries: usize,
    keys: usize,
    /// Tokens after that of the last row.
    behind: usize,
}

impl Call<'_> {
    pub fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (Ok((_, queries, heads, _)), Ok((_, keys, _, _))) = (q.dims4(), k.dims4()) else {
            bail!(
                "flash_attn: expected query (batch, tokens, heads, head_dim) and key (batch, tokens, kv_heads, \
                 head_dim), got {:?} and {:?}; split the heads with reshape",
                q.dims(),
                k.dims()
            )
        };
        let lens = Lens {
            heads,
            queries,
            keys,
            behind: 0,
        };
        // A single row at the end sees what a causal one sees.
        let right = self.right.filter(|_| queries > 1).or((queries == 1).then_some(0));
        let call = Call { right, ..*self };
        let options = call.options(&lens, q.device());
        match attend_next_layer(q, k, v, &options?) {
            Some(output) => output,
            None => call.dense(lens, q, k, v),
        }
    }

    fn options(&self, lens: &Lens, device: &Device) -> Result<AttentionOptions> {
        let causal = self.right == Some(0);
        // Rows that see both sides are those of another sequence to the library: it aligns no window with them.
        let aligned = causal || lens.queries == lens.keys;
        let mask = self.left.filter(|_| !aligned).map(|left| mask(lens, left, device));
        let slopes = self.slopes.map(|slopes| self.bias(slopes, lens, device));
        let bias = match (slopes.transpose()?, mask.transpose()?) {
            (Some(slopes), Some(mask)) => Some(slopes.broadcast_add(&mask)?),
            (slopes, mask) => slopes.or(mask),
        };
        Ok(AttentionOptions {
            softmax_scale: Some(f64::from(self.scale)),
            causal,
            bias,
            sliding_window: self.left.filter(|_| aligned).map(|left| left + 1),
            softcap: self.softcap.filter(|softcap| *softcap != 0.).map(f64::from),
            layout: TensorLayout::TokensFirst,
            ..Default::default()
        })
    }

    /// Causal rows differ from `-slope · distance` by a number of their own, which softmax does not see: `slope ·
    /// (token - last token)` is one number a column. Other rows need all distances.
    fn bias(&self, slopes: &Tensor, lens: &Lens, device: &Device) -> Result<Tensor> {
        let slopes = match slopes.rank() {
            1 => slopes.reshape((1, (), 1, 1))?,
            _ => slopes.unsqueeze(2)?.unsqueeze(3)?,
        };
        if slopes.dim(1)? != lens.heads {
            bail!(
                "alibi_slopes: expected shape (heads) or (batch, heads) with {} heads, got {:?}; give one slope a head",
                lens.heads,
                slopes.dims()
            )
        }
        let distances = if self.right == Some(0) && lens.behind == 0 {
            let distance = |token: usize| token as f32 - (lens.keys - 1) as f32;
            Tensor::from_iter((0..lens.keys).map(distance), device)?.reshape((1, 1, 1, lens.keys))?
        } else {
            let first = lens.keys as f32 - (lens.queries + lens.behind) as f32;
            let distance = |at: usize| -(first + (at / lens.keys) as f32 - (at % lens.keys) as f32).abs();
            let all = Tensor::from_iter((0..lens.queries * lens.keys).map(distance), device)?;
            all.reshape((1, 1, lens.queries, lens.keys))?
        };
        slopes.to_dtype(DType::F32)?.detach().broadcast_mul(&distances)
    }

    /// Dense attention.
    fn dense(&self, lens: Lens, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let Lens { queries, keys, .. } = lens;
        let blank = self.right.map_or(0, |right| queries.saturating_sub(keys + right));
        if blank > 0 {
            // The first rows stand so long before the first token that they see nothing.
            let lens = Lens {
                queries: queries - blank,
                ..lens
            };
            let seen = self.dense(lens, &q.narrow(1, blank, lens.queries)?, k, v)?;
            return seen.pad_with_zeros(1, blank, 0);
        }
        match self.right {
            Some(0) => self.attend(lens, q, k, v),
            Some(right) if right + 1 < queries => {
                // A row that sees `right` tokens more is the causal row of a later token; the last rows see the end.
                let early = queries - right;
                let causal = Self {
                    left: self.left.map(|left| left + right),
                    right: Some(0),
                    ..*self
                };
                let shifted = Lens {
                    queries: early,
                    behind: right,
                    ..lens
                };
                let first = causal.attend(shifted, &q.narrow(1, 0, early)?, k, v)?;
                let late = Self { right: None, ..*self };
                let rows = q.narrow(1, early, right)?;
                let lens = Lens { queries: right, ..lens };
                Tensor::cat(&[first, late.attend(lens, &rows, k, v)?], 1)
            }
            Some(_) | None => Self { right: None, ..*self }.attend(lens, q, k, v),
        }
    }

    /// Dense attention, causal or to both sides.
    fn attend(&self, lens: Lens, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let options = self.options(&lens, q.device())?;
        let (config, off) = (
            CompressionConfig::default(),
            HeadStrategies::uniform(MergeStrategy::Off),
        );
        let plan = MergePlan::new(q, k, v, &off, &config, &options)?;
        attend(q, k, v, &plan, &options)
    }
}

/// (1, 1, Nq, Nk): minus infinity at tokens more than `left` before a row's own.
fn mask(lens: &Lens, left: usize, device: &Device) -> Result<Tensor> {
    let Lens {
        queries, keys, behind, ..
    } = *lens;
    let cell = |at: usize| {
        let (row, token) = (keys + at / keys, queries + behind + at % keys);
        if token + left < row {
            f32::NEG_INFINITY
        } else {
            0.
        }
    };
    Tensor::from_iter((0..queries * keys).map(cell), device)?.reshape((1, 1, queries, keys))
}
