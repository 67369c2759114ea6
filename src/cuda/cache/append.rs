//! Tokens appended one after another, and the growth of the lists' buffers.

use super::copy::paste;
use super::pages::{Refit, PAGE};
use super::DeviceLists;
use crate::config::AttentionOptions;
use crate::cuda::decide::reads_bias;
use crate::cuda::decode::{decode, decodes, Appended, DecodeCall, StateArgs};
use crate::cuda::extras::{has_extras, ExtraBuffers, ScoreBuffer};
use crate::cuda::on_gpu::{Gpu, GpuElement, Kernel, Launch, Source};
use crate::cuda::operands::BiasBuffer;
use crate::cuda::params::NO_SLIDE;
use crate::problem::{Problem, RowLayout};
use candle_core::{bail, Result};
use std::ops::Range;

impl<G: Gpu, T: GpuElement> DeviceLists<G, T> {
    /// Runs `step`, which appends `count` tokens, unless a list would then have more than `limit` entries. Only the
    /// device knows the number of entries. So near the limit `step` runs on a copy of the lists, and the host waits for
    /// it.
    ///
    /// # Errors
    /// More entries than the limit, or an error of `step`; the lists are then unchanged.
    pub fn within<R>(
        &mut self,
        gpu: &G,
        count: usize,
        limit: Option<usize>,
        step: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        let Some(limit) = limit.filter(|limit| self.nears(*limit, count)) else {
            return step(self);
        };
        // The bound counts entries that have left the sliding window.
        if self.slide() != NO_SLIDE {
            self.learn(gpu)?;
            if !self.nears(limit, count) {
                return step(self);
            }
        }
        let mut next = self.copy(gpu)?;
        next.step_as(gpu, self)?;
        let result = step(&mut next)?;
        let needed = next.entries(gpu)?.into_iter().flatten().max().unwrap_or(0);
        if needed > limit {
            bail!(
                "max_entries: expected at most {limit} entries in a list, got {needed} with the {count} new tokens; \
                 raise the limit, merge more, or reset()"
            )
        }
        *self = next;
        Ok(result)
    }

    /// Whether a list may have more than `limit` entries after `count` more tokens.
    pub fn nears(&self, limit: usize, count: usize) -> bool {
        self.state.pages.most_seen() + count + self.settings.config.window + 1 > limit
    }

    /// Appends `count` tokens without computing their output rows. With options, as a call that attends by them does.
    ///
    /// # Errors
    /// As [`Self::append_and_attend`] with options, else an error of the device.
    pub fn append<'a>(
        &mut self,
        gpu: &G,
        qkv: [Source<'a, G, T>; 3],
        count: usize,
        options: Option<&AttentionOptions>,
        extras: ExtraBuffers<'a, G>,
    ) -> Result<()> {
        if let Some(options) = options {
            self.attend_under(gpu, options)?;
        }
        let default = AttentionOptions::default();
        let options = options.unwrap_or(&default);
        if self.seq_len == 0 && count > 1 {
            return self.first_chunk(gpu, qkv, count, (options, false), extras).map(|_| ());
        }
        let scale = options.scale(self.settings.problem.head_dim);
        for (tokens, together) in self.pieces(count) {
            let (qkv, extras) = piece(qkv, extras, tokens.start);
            match together {
                true => self
                    .chunk(gpu, qkv, tokens.len(), (options, false), extras)
                    .map(|_| ())?,
                false => self.append_in_turn(gpu, qkv, tokens.len(), scale, (extras, None))?,
            }
        }
        Ok(())
    }

    /// `count` tokens that follow others, in pieces, and whether a piece is taken together.
    fn pieces(&self, count: usize) -> Vec<(Range<usize>, bool)> {
        let (mut pieces, mut start) = (Vec::new(), 0);
        while start < count {
            let piece = self.together(count - start);
            let (end, together) = if piece > 1 {
                (start + piece, true)
            } else {
                (count, false)
            };
            pieces.push((start..end, together));
            start = end;
        }
        pieces
    }

    /// Appends `count` tokens, one after another. If `count` is 1, `queries` receives the last token's queries as
    /// attention reads them. Decisions read the bias of the new rows.
    fn append_in_turn(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        count: usize,
        scale: f64,
        (extras, queries): (ExtraBuffers<'_, G>, Option<&mut G::Slice<T>>),
    ) -> Result<()> {
        self.reserve(gpu, count)?;
        let bias = extras.bias.filter(|_| reads_bias(&self.settings.config));
        let params = self.params_under(&qkv, ExtraBuffers { bias, ..extras }, count, scale)?;
        let launch = self.per_list();
        let [q, k, v] = qkv;
        let mut args = vec![
            gpu.read(q.0),
            gpu.read(k.0),
            gpu.read(v.0),
            gpu.read(&self.tests),
            gpu.read_some(bias.map(|bias| bias.data)),
            gpu.read_some(extras.scores.map(|scores| scores.data)),
            gpu.write_some(queries),
        ];
        args.extend(self.state.args(gpu));
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_append"), launch, &args)?;
        drop(args);
        self.count(gpu, count)?;
        // A long chunk that merged well leaves more room than needed.
        if count >= PAGE {
            self.learn(gpu)?;
            self.fit(gpu, 0)?;
        }
        Ok(())
    }

    /// Appends `count` tokens and returns their output rows (B, H, count, Dv). The bias is that of `options`, as a view
    /// of (B, H, count, all tokens). The first call fixes the sliding window.
    ///
    /// # Errors
    /// Another sliding window than in the calls before, strides that the kernels do not accept, or an error of the
    /// device.
    pub fn append_and_attend<'a>(
        &mut self,
        gpu: &G,
        qkv: [Source<'a, G, T>; 3],
        count: usize,
        options: &AttentionOptions,
        extras: ExtraBuffers<'a, G>,
    ) -> Result<G::Slice<T>> {
        let before = self.sliding_window;
        self.attend_under(gpu, options)?;
        let result = self.rows(gpu, qkv, count, options, extras);
        if result.is_err() {
            self.sliding_window = before;
        }
        result
    }

    /// Puts the lists under the sliding window of the first call that attends.
    ///
    /// # Errors
    /// Another one than in the calls before, or an error of the device.
    pub fn attend_under(&mut self, gpu: &G, options: &AttentionOptions) -> Result<()> {
        let (length, before) = (options.sliding_window_after(self.sliding_window)?, self.sliding_window);
        self.sliding_window = Some(length);
        match before.is_none() && length.is_some() && self.seq_len > 0 {
            true => self.slide_lists(gpu),
            false => Ok(()),
        }
    }

    /// Puts the lists under a sliding window that the calls before did not have.
    pub(super) fn slide_lists(&mut self, gpu: &G) -> Result<()> {
        let params = self.bare_params(self.seq_len, 0)?;
        let launch = self.per_list();
        let mut args = self.state.args(gpu);
        args.push(gpu.value(&params));
        gpu.launch(&Kernel::of::<T>("cache_slide"), launch, &args)
    }

    fn rows<'a>(
        &mut self,
        gpu: &G,
        qkv: [Source<'a, G, T>; 3],
        count: usize,
        options: &AttentionOptions,
        extras: ExtraBuffers<'a, G>,
    ) -> Result<G::Slice<T>> {
        if self.seq_len == 0 && count > 1 {
            if let Some(output) = self.first_chunk(gpu, qkv, count, (options, true), extras)? {
                return Ok(output);
            }
        }
        if count == 1 {
            return self.one(gpu, qkv, options, extras);
        }
        let Problem { heads, value_dim, .. } = self.settings.problem;
        let rows = self.batch * heads;
        let mut output = None;
        let mut put = |gpu: &G, from: G::Slice<T>, tokens: Range<usize>| -> Result<()> {
            if tokens.len() == count {
                output = Some(from);
                return Ok(());
            }
            if output.is_none() {
                output = Some(gpu.zeros::<T>(rows * count * value_dim)?);
            }
            let (Some(to), stride) = (&mut output, count * value_dim) else {
                return Ok(());
            };
            paste(
                gpu,
                (&from, tokens.len() * value_dim),
                (to, stride),
                rows,
                tokens.start * value_dim,
            )
        };
        for (tokens, together) in self.pieces(count) {
            if together {
                let (qkv, extras) = piece(qkv, extras, tokens.start);
                if let Some(rows) = self.chunk(gpu, qkv, tokens.len(), (options, true), extras)? {
                    put(gpu, rows, tokens)?;
                }
                continue;
            }
            for token in tokens {
                let (qkv, extras) = piece(qkv, extras, token);
                let row = self.one(gpu, qkv, options, extras)?;
                put(gpu, row, token..token + 1)?;
            }
        }
        match output {
            Some(output) => Ok(output),
            None => {
                bail!("cache: expected at least one token, got none; this is a defect of the crate, please report it")
            }
        }
    }

    fn one(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        options: &AttentionOptions,
        extras: ExtraBuffers<'_, G>,
    ) -> Result<G::Slice<T>> {
        let Problem {
            heads,
            head_dim,
            value_dim,
            ..
        } = self.settings.problem;
        let scale = options.scale(head_dim);
        let plain = !has_extras(options) && decodes::<T>(self.settings.code, [head_dim, value_dim]);
        if plain && !self.settings.config.fold.folds_queries() {
            return self.take_and_decode(gpu, qkv, scale, extras.scores);
        }
        let mut queries = gpu.alloc::<T>(self.batch * heads * head_dim)?;
        self.append_in_turn(gpu, qkv, 1, scale, (extras, Some(&mut queries)))?;
        if !plain {
            return self.attend(gpu, &queries, options, extras);
        }
        let folded = RowLayout {
            offset: 0,
            strides: [heads * head_dim, head_dim, 0],
            dim: head_dim,
        };
        let call = DecodeCall {
            queries: &queries,
            appended: None,
            params: self.params(&[(&queries, folded), qkv[1], qkv[2]], 1, scale)?,
            code: self.settings.code,
            most: self.seq_len.min(self.slide() as usize),
            some_sit_out: self.some_sit_out(),
            scale,
        };
        decode(gpu, &call, &mut self.state, &mut self.scratch)
    }

    /// Appends one token and attends in one launch, where attention reads its raw queries.
    fn take_and_decode(
        &mut self,
        gpu: &G,
        qkv: [Source<'_, G, T>; 3],
        scale: f64,
        scores: Option<ScoreBuffer<'_, G>>,
    ) -> Result<G::Slice<T>> {
        let extras = ExtraBuffers {
            scores,
            ..ExtraBuffers::none()
        };
        self.reserve(gpu, 1)?;
        let [q, k, v] = qkv;
        let call = DecodeCall {
            queries: q.0,
            appended: Some(Appended {
                key: k.0,
                value: v.0,
                tests: &self.tests,
                scores: scores.map(|scores| scores.data),
            }),
            params: self.params_under(&qkv, extras, 1, scale)?,
            code: self.settings.code,
            most: self.seq_len.min(self.slide() as usize),
            some_sit_out: self.some_sit_out(),
            scale,
        };
        let output = decode(gpu, &call, &mut self.state, &mut self.scratch)?;
        self.count(gpu, 1)?;
        Ok(output)
    }

    /// Makes room for `count` more closed chains in every list.
    pub(super) fn reserve(&mut self, gpu: &G, count: usize) -> Result<()> {
        let most = self.seq_len + count;
        u32::try_from(most).map_err(|_| too_many(most))?;
        if self.state.pages.has_room(count) {
            return Ok(());
        }
        self.learn(gpu)?;
        self.fit(gpu, count)
    }

    /// Reads the lengths of all lists. Waits for the device.
    pub(super) fn learn(&mut self, gpu: &G) -> Result<()> {
        let lengths = gpu.download(&self.state.lengths)?;
        let starts = match self.slide() {
            NO_SLIDE => None,
            _ => Some(gpu.download(&self.state.starts)?),
        };
        self.state.pages.learn(&lengths, starts.as_deref());
        Ok(())
    }

    /// Gives every list pages for `count` more entries, frees pages that it does not need, and those at its front that
    /// no later row sees. The lengths were just learnt.
    pub(super) fn fit(&mut self, gpu: &G, count: usize) -> Result<()> {
        self.fit_each(gpu, |_| count)
    }

    /// [`Self::fit`] with a number of entries for each list.
    pub(super) fn fit_each(&mut self, gpu: &G, counts: impl Fn(usize) -> usize) -> Result<()> {
        let refit = self.state.pages.fit(gpu, counts)?;
        self.copy_pages(gpu, &refit)?;
        if refit.gone.iter().any(|gone| *gone > 0) {
            let shifted = |words: &G::Slice<u32>| -> Result<G::Slice<u32>> {
                let mut words = gpu.download(words)?;
                for (word, gone) in words.iter_mut().zip(&refit.gone) {
                    *word -= *gone as u32;
                }
                gpu.upload(&words)
            };
            (self.state.lengths, self.state.starts) = (shifted(&self.state.lengths)?, shifted(&self.state.starts)?);
        }
        Ok(())
    }

    /// Copies the pages that other lists hold, too.
    ///
    /// # Errors
    /// An error of the device.
    pub fn unshare(&mut self, gpu: &G) -> Result<()> {
        self.learn(gpu)?;
        let refit = self.state.pages.unshare(gpu)?;
        self.copy_pages(gpu, &refit)
    }

    fn copy_pages(&self, gpu: &G, refit: &Refit<G>) -> Result<()> {
        if !refit.copies.is_empty() {
            let ([from, to], used) = refit.addresses();
            let (from, to, used) = (gpu.upload(&from)?, gpu.upload(&to)?, gpu.upload(&used)?);
            let launch = Launch {
                grid: [refit.copies.len(), PAGE / 4, 1],
                threads: 128,
                shared_bytes: 0,
            };
            let params = self.bare_params(self.seq_len, 0)?;
            let args = [gpu.read(&from), gpu.read(&to), gpu.read(&used), gpu.value(&params)];
            let kernel = match self.settings.code {
                None => Kernel::of::<T>("cache_copy_page"),
                Some(_) => Kernel::plain("cache_copy_page_coded"),
            };
            gpu.launch(&kernel, launch, &args)?;
        }
        Ok(())
    }
}

/// The error of more tokens than kernels can count.
pub(super) fn too_many(tokens: usize) -> candle_core::Error {
    candle_core::Error::msg(format!(
        "cache: expected at most 2^32 - 1 tokens, got {tokens}; reset() it"
    ))
}

/// The tokens from number `first` on, and what belongs to their rows.
fn piece<'a, G: Gpu, T: GpuElement>(
    qkv: [Source<'a, G, T>; 3],
    extras: ExtraBuffers<'a, G>,
    first: usize,
) -> ([Source<'a, G, T>; 3], ExtraBuffers<'a, G>) {
    let at = |(slice, layout): Source<'a, G, T>| {
        let offset = layout.offset + first * layout.strides[2];
        (slice, RowLayout { offset, ..layout })
    };
    let bias = extras.bias.map(|bias| BiasBuffer {
        offset: bias.offset + first * bias.strides[2],
        ..bias
    });
    let scores = extras.scores.map(|scores| scores.from(first));
    (qkv.map(at), ExtraBuffers { bias, scores, ..extras })
}
