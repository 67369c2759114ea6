//! One call of attention inside a session's scope.

use super::{LayerRules, ModelCache, Session};
use crate::cache::CompressedKvCache;
use crate::calibrate::ModelShape;
use crate::config::{AttentionOptions, TensorLayout};
use candle_core::{bail, DType, Result, Tensor};
use std::cell::RefCell;

thread_local! {
    /// The session whose scope runs on this thread.
    static CURRENT: RefCell<Option<Running>> = const { RefCell::new(None) };
}

/// A session while its scope runs.
pub(super) struct Running {
    pub shape: ModelShape,
    pub model_cache: ModelCache,
    pub rules: Vec<LayerRules>,
    pub layers: Vec<CompressedKvCache>,
    /// Calls that have succeeded.
    pub calls: usize,
}

/// Gives the caches back to the session when it ends, by a panic too.
pub(super) struct Scope<'s>(&'s mut Session);

impl<'s> Scope<'s> {
    pub fn enter(session: &'s mut Session) -> Result<Self> {
        CURRENT.with_borrow_mut(|current| {
            if current.is_some() {
                session.broken = false;
                bail!(
                    "session: expected no other session's scope on this thread, got a scope inside a scope; end the \
                     outer one first"
                )
            }
            *current = Some(session.take_running());
            Ok(())
        })?;
        Ok(Self(session))
    }

    /// Ends the scope; the number of calls that succeeded in it.
    pub fn leave(mut self) -> usize {
        self.give_back()
    }

    fn give_back(&mut self) -> usize {
        let running = CURRENT.take();
        running.map_or(0, |running| {
            self.0.layers = running.layers;
            running.calls
        })
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Attention of the next layer of the session whose scope runs on this thread; `None` outside a scope. Query
/// (B, H, n, D), key and value (B, Hk, tokens, D), output (B, H, n, D), or in the order of
/// [`AttentionOptions::layout`]. Key and value may have H heads: the KV heads, each repeated once for each query head
/// of its group. They hold the n new tokens, after all earlier ones under [`ModelCache::Kept`].
///
/// # Errors
/// More calls than the model has layers, heads or a head size of another model, keys of other tokens than the session
/// expects, KV heads that are no repetition, several query rows without `causal`, or as
/// [`CompressedKvCache::append_and_attend`]. The layer's cache is then unchanged.
pub fn attend_next_layer(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Option<Result<Tensor>> {
    // The session is out of its place during the call, which may run other work on this thread.
    let mut running = CURRENT.take()?;
    let output = running.call([q, k, v], options);
    CURRENT.set(Some(running));
    Some(output)
}

/// Whether a session's scope runs on this thread.
pub fn is_running() -> bool {
    CURRENT.with_borrow(Option::is_some)
}

impl Running {
    fn call(&mut self, qkv: [&Tensor; 3], options: &AttentionOptions) -> Result<Tensor> {
        let layers = self.layers.len();
        let Some(cache) = self.layers.get_mut(self.calls) else {
            bail!(
                "session: expected {layers} calls of attention in the scope, one a layer, got another one; run one \
                 forward pass of the model in each scope, and give the session the model's number of layers"
            )
        };
        let [q, k, v] = options.layout.turned_all(qkv)?;
        let seen = cache.seq_len();
        let new = NewTokens::check(&self.shape, self.model_cache, seen, [&q, &k, &v])?;
        if let Some(batch) = cache.batch().filter(|batch| *batch != new.batch) {
            bail!(
                "session: expected a batch of {batch} rows, as in the calls before, got {}; reset() the session for \
                 another batch",
                new.batch
            )
        }
        if !options.causal && new.tokens > 1 {
            bail!(
                "session: expected causal attention, got {} query rows that see later tokens; a cached row cannot see \
                 tokens that come later",
                new.tokens
            )
        }
        let rules = self.rules.get(self.calls).copied().unwrap_or_default();
        // A single row sees all tokens either way.
        let inner = AttentionOptions {
            causal: true,
            layout: TensorLayout::HeadsFirst,
            sliding_window: one_of("sliding_window", options.sliding_window, rules.sliding_window)?,
            softcap: one_of("softcap", options.softcap, rules.softcap)?,
            ..options.clone()
        };
        // A wrong number of KV heads shows at the first tokens.
        let (k, v) = (new.own("key", &k, seen == 0)?, new.own("value", &v, seen == 0)?);
        let output = cache.append_and_attend(&q, &k, &v, &inner)?;
        self.calls += 1;
        options.layout.turned(&output)
    }
}

/// What the call or the layer's rules name.
fn one_of<T: Copy + PartialEq + std::fmt::Debug>(name: &str, call: Option<T>, rule: Option<T>) -> Result<Option<T>> {
    match (call, rule) {
        (Some(call), Some(rule)) if call != rule => bail!(
            "session: expected a {name} of {rule:?} by the layer's rules, got a call with {call:?}; leave it out of \
             SessionOptions::rules"
        ),
        _ => Ok(call.or(rule)),
    }
}

/// The new tokens of one call.
struct NewTokens {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    tokens: usize,
}

impl NewTokens {
    /// Checks the shapes of query, key and value, heads first, of a layer that has seen `seen` tokens.
    fn check(shape: &ModelShape, model_cache: ModelCache, seen: usize, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        let ModelShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *shape;
        let (Ok((batch, q_heads, tokens, dim)), Ok((_, k_heads, all, k_dim))) = (q.dims4(), k.dims4()) else {
            bail!(
                "session: expected query and key of 4 axes (batch, tokens, heads, head_dim), got {:?} and {:?}",
                q.dims(),
                k.dims()
            )
        };
        let fits = (q_heads, dim, k_dim) == (heads, head_dim, head_dim) && [heads, kv_heads].contains(&k_heads);
        if !fits || v.dims() != k.dims() {
            bail!(
                "session: expected {heads} query heads over {kv_heads} KV heads (repeated or not) of {head_dim} \
                 numbers, got query {:?}, key {:?} and value {:?} as (batch, heads, tokens, head_dim); make the \
                 session with this model's shape",
                q.dims(),
                k.dims(),
                v.dims()
            )
        }
        let (expected, remedy) = match model_cache {
            ModelCache::Kept => (
                seen + tokens,
                "reset() the session when the model's cache is cleared, cut the model's cache back where truncate() \
                 cut the session's, or choose ModelCache::Cleared if the model keeps none or forgets tokens",
            ),
            ModelCache::Cleared => (
                tokens,
                "clear the model's own cache before each call, switch it off, or choose ModelCache::Kept",
            ),
        };
        if all != expected {
            bail!(
                "session: expected keys of {expected} tokens ({tokens} new, {seen} seen, {model_cache:?}), got {all}; \
                 {remedy}"
            )
        }
        Ok(Self {
            batch,
            heads,
            kv_heads,
            tokens,
        })
    }

    /// The new tokens of keys or values, each KV head once: (B, Hk, n, D), a view where the tensor is contiguous in
    /// either layout. With `compare` repeated heads are held against each other, which on a GPU waits for the device.
    fn own(&self, name: &str, tensor: &Tensor, compare: bool) -> Result<Tensor> {
        let (batch, heads, all, dim) = tensor.dims4()?;
        if heads == self.kv_heads {
            return tensor.narrow(2, all - self.tokens, self.tokens);
        }
        let group = self.heads / self.kv_heads;
        let tokens_first = tensor.transpose(1, 2)?;
        // (B, Hk, group, tokens, D)
        let groups = if !tensor.is_contiguous() && tokens_first.is_contiguous() {
            let groups = tokens_first.reshape((batch, all, self.kv_heads, group, dim))?;
            groups.permute((0, 2, 3, 1, 4))?
        } else {
            tensor.reshape((batch, self.kv_heads, group, all, dim))?
        };
        let groups = groups.narrow(3, all - self.tokens, self.tokens)?;
        if compare {
            let last = groups.narrow(3, self.tokens - 1, 1)?.to_dtype(DType::F64)?;
            let last = last.flatten_all()?.to_vec1::<f64>()?;
            let same = |group: &[f64]| group.chunks_exact(dim).all(|head| bits(head).eq(bits(&group[..dim])));
            if !last.chunks_exact(group * dim).all(same) {
                bail!(
                    "session: expected {} KV heads, each repeated {group} times, got {name} heads that differ within \
                     a group; make the session with the model's number of KV heads",
                    self.kv_heads
                )
            }
        }
        groups.narrow(2, 0, 1)?.squeeze(2)
    }
}

/// Two NaN are the same.
fn bits(row: &[f64]) -> impl Iterator<Item = u64> + '_ {
    row.iter().map(|x| x.to_bits())
}
