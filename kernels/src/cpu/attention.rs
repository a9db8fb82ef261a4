//! Attention over paged KV: one kernel for prefill and decode.
//!
//! Scores of a block of 64 absolute positions at a time, with an online softmax between blocks. A score is
//! one chain over the head's dimensions, an output one chain over positions; which queries are computed
//! together changes neither. Positions that a query may not see count exactly zero, and memory that was
//! never written is never multiplied.

use super::Cpu;
use super::buffer::{Buffer, Rows, Shared};
use super::element::{Bf16, Dtype, Element, F16, write_row};
use super::linear::{
    CACHE_LINE, MAX_TILE_ROWS, PACKED, PANEL, Segment, Split, Tile, pack_tile, packed_len, packed_offset,
    tiles,
};
use super::simd::{LANES, Op, Simd, exp, max_lane, sum};
use crate::KvPages;
use std::cell::RefCell;
use tandem_proto::ids::{LayerIdx, PageId};

/// Positions of a block. Blocks start at multiples of it, whatever a step begins with.
const BLOCK: usize = 64;
/// Rows (queries times heads of a group) of one task: enough to pay for turning a block of keys.
const TASK_ROWS: usize = 8 * MAX_TILE_ROWS;

/// The heads of a layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f32,
    /// A query sees so many positions, itself included; all before it if none is given.
    pub window: Option<u32>,
}

impl Heads {
    /// Numbers of a row of queries, keys and values.
    #[must_use]
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// The first position that a query at `position` sees.
    #[inline(always)]
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w as usize))
    }

    /// Query heads that share a key head.
    #[inline(always)]
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The new tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// The first token's row.
    pub row: usize,
    /// Tokens.
    pub tokens: usize,
    /// Position of the first token.
    pub start: u32,
    /// The sequence's pages, from position 0.
    pub pages: &'a [PageId],
}

/// Writes the keys and values of all rows of `qkv` to their pages.
///
/// # Panics
/// When a page table is too short or names a page outside the pool, or widths do not fit.
pub fn store_kv(cpu: &Cpu, heads: &Heads, layer: LayerIdx, qkv: &Rows, spans: &[Span<'_>], kv: &mut KvPages) {
    check(heads, qkv, spans, kv);
    let shape = *kv.shape();
    let dtype = Dtype::from(shape.dtype);
    let page_tokens = shape.page_tokens as usize;
    let row_bytes = shape.row_bytes();
    let head_bytes = page_tokens * row_bytes;
    let tokens: usize = spans.iter().map(|s| s.tokens).sum();
    // Both kinds of every head in one loop, as tasks.
    let tasks = 2 * heads.kv_heads;
    let base = Shared::new(kv.bytes_mut());
    let kv = &*kv;
    let body = |task: usize| {
        let (head, value) = (task % heads.kv_heads, task >= heads.kv_heads);
        let column = (heads.heads + task) * heads.head_dim;
        for span in spans {
            for token in 0..span.tokens {
                let position = span.start as usize + token;
                let page = span.pages[position / page_tokens];
                let offset = kv.head_offset(layer, page, head as u32, value);
                // SAFETY: the offset names this head's rows of a page that exists. No other task writes this
                // head's keys or values, and nothing reads KV while `store_kv` holds it exclusively; `kv` is
                // used for offsets alone.
                let rows = unsafe { std::slice::from_raw_parts_mut(base.get().add(offset), head_bytes) };
                let to = &mut rows[position % page_tokens * row_bytes..][..row_bytes];
                write_row(dtype, &qkv.row(span.row + token)[column..column + heads.head_dim], to);
            }
        }
    };
    if tokens < 16 {
        (0..tasks).for_each(body);
    } else {
        cpu.team.run(tasks, body);
    }
}

/// Attention of all rows of `qkv` over the pages of their sequences, which hold their own keys and values
/// too. `out` gets rows of all query heads.
///
/// # Panics
/// As [`store_kv`].
pub fn attention(
    cpu: &Cpu,
    heads: &Heads,
    layer: LayerIdx,
    qkv: &Rows,
    spans: &[Span<'_>],
    kv: &KvPages,
    out: &mut Rows,
) {
    check(heads, qkv, spans, kv);
    out.reshape(qkv.rows(), heads.heads * heads.head_dim);
    let step = (TASK_ROWS / heads.group()).max(1);
    let mut tasks: Vec<Task<'_>> = Vec::new();
    for span in spans {
        // Pieces of equal size: a short last one would turn as many keys for less.
        let pieces = Split::new(span.tokens, step);
        for piece in 0..pieces.tiles {
            for kv_head in 0..heads.kv_heads {
                tasks.push(Task {
                    span: *span,
                    first: pieces.first(piece),
                    tokens: pieces.height(piece),
                    kv_head,
                });
            }
        }
    }
    // Longest first, so that no thread starts the longest when the others are done.
    tasks.sort_by_key(|t| std::cmp::Reverse((t.span.start as usize + t.first + t.tokens) * t.tokens));
    let to = Shared::new(out.data_mut());
    let attend = |index: usize| {
        SCRATCH.with_borrow_mut(|scratch| {
            let task = tasks[index];
            // Threads take turns, more or less: this is what this one probably takes next.
            let then = tasks.get(index + cpu.team.threads()).map(|then| {
                let (first, end) = then.blocks(heads);
                Coming::new(Place::new(kv, layer, then), first * BLOCK, end)
            });
            cpu.isa.run(Attend {
                work: Work { heads, qkv, to, task, place: Place::new(kv, layer, &task), then },
                scratch,
            });
        });
    };
    let steps: usize = tasks.iter().map(|t| (t.span.start as usize + t.first + t.tokens) * t.tokens).sum();
    if steps * heads.head_dim * heads.group() < 1 << 15 {
        (0..tasks.len()).for_each(attend);
    } else {
        cpu.team.run(tasks.len(), attend);
    }
}

fn check(heads: &Heads, qkv: &Rows, spans: &[Span<'_>], kv: &KvPages) {
    let shape = kv.shape();
    assert_eq!(qkv.width(), heads.qkv_width());
    assert_eq!((heads.kv_heads, heads.head_dim), (shape.kv_heads as usize, shape.head_dim as usize));
    assert!(heads.heads.is_multiple_of(heads.kv_heads));
    for span in spans {
        assert!(span.row + span.tokens <= qkv.rows());
        let pages = (span.start as usize + span.tokens).div_ceil(shape.page_tokens as usize);
        assert!(span.pages.len() >= pages, "a page table of {} for {pages} pages", span.pages.len());
        assert!(span.pages[..pages].iter().all(|p| p.0 < kv.pages()));
    }
}

thread_local! {
    static SCRATCH: RefCell<Buffer> = const { RefCell::new(Buffer::new()) };
}

/// Some new tokens of one sequence, for the query heads that share one key head.
#[derive(Clone, Copy)]
struct Task<'a> {
    span: Span<'a>,
    /// First of the span's tokens.
    first: usize,
    tokens: usize,
    kv_head: usize,
}

impl Task<'_> {
    /// The first block of positions that it sees, and one past the last position.
    #[inline(always)]
    fn blocks(&self, heads: &Heads) -> (usize, usize) {
        let start = self.span.start as usize + self.first;
        (heads.first_seen(start) / BLOCK, start + self.tokens)
    }
}

/// Where the keys and values of a sequence and a head lie.
#[derive(Clone, Copy)]
struct Place<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    pages: &'a [PageId],
    page_tokens: usize,
    head_dim: usize,
    /// See [`KvPages::head_strides`].
    strides: (usize, usize, usize),
}

impl<'a> Place<'a> {
    fn new(kv: &'a KvPages, layer: LayerIdx, task: &Task<'a>) -> Place<'a> {
        let shape = kv.shape();
        Place {
            bytes: kv.bytes(),
            dtype: Dtype::from(shape.dtype),
            pages: task.span.pages,
            page_tokens: shape.page_tokens as usize,
            head_dim: shape.head_dim as usize,
            strides: kv.head_strides(layer, task.kv_head as u32),
        }
    }

    /// Where the key and the value of a position lie, and how many rows follow in the page from there on.
    #[inline(always)]
    fn rows_at(&self, position: usize) -> (*const u8, *const u8, usize) {
        let (page, row) = (position / self.page_tokens, position % self.page_tokens);
        let (first, step, to_values) = self.strides;
        let offset = first + self.pages[page].0 as usize * step + row * self.row_bytes();
        let (k, v) = (&self.bytes[offset..], &self.bytes[offset + to_values..]);
        (k.as_ptr(), v.as_ptr(), self.page_tokens - row)
    }

    #[inline(always)]
    fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.size_bytes()
    }
}

/// Positions that come after the block at hand, a block at most: they are asked for while it is computed.
///
/// Pages lie anywhere, so the machine cannot guess the next. Lines are asked for in step with the work: all at once
/// they would fill the core's queues, and its loads would wait for them. So each phase of a block asks for a part,
/// as long as it lasts: the turning of keys for keys, which are needed first, the scores for the first half of the
/// values, the weighted sum for the other half.
#[derive(Clone, Copy)]
struct Coming<'a> {
    place: Place<'a>,
    start: usize,
    end: usize,
}

impl<'a> Coming<'a> {
    fn new(place: Place<'a>, start: usize, end: usize) -> Coming<'a> {
        Coming { place, start, end: end.min(start + BLOCK) }
    }

    /// How many rows lie one after another from its position number `i` on.
    #[inline(always)]
    fn run(&self, i: usize) -> usize {
        self.place.page_tokens - (self.start + i) % self.place.page_tokens
    }

    /// The value of its position number `i`; null beyond the last.
    #[inline(always)]
    fn value(&self, i: usize) -> *const u8 {
        if self.start + i < self.end { self.place.rows_at(self.start + i).1 } else { std::ptr::null() }
    }
}

#[derive(Clone, Copy)]
struct Work<'a> {
    heads: &'a Heads,
    qkv: &'a Rows,
    to: Shared<f32>,
    task: Task<'a>,
    place: Place<'a>,
    /// What comes after the last block.
    then: Option<Coming<'a>>,
}

struct Attend<'a> {
    work: Work<'a>,
    scratch: &'a mut Buffer,
}

impl Op for Attend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.work.attend(s, self.scratch);
    }
}

/// The parts of a task's scratch memory.
struct Scratch<'a> {
    /// Queries, packed by tile: `[dimension][row]`.
    queries: &'a mut [f32],
    /// `[half block][dimension][32 positions]`
    keys: &'a mut [f32],
    /// `[position][dimension]`, padded to whole panels.
    values: &'a mut [f32],
    /// `[row of a tile][position]`
    scores: &'a mut [f32],
    /// Unscaled outputs: `[row][dimension]`, padded as the values.
    sums: &'a mut [f32],
    /// The greatest score of each row so far.
    peaks: &'a mut [f32],
    /// The sum of each row's weights so far.
    weights: &'a mut [f32],
    /// Sixteen rows of keys as f32.
    turning: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(buffer: &'a mut Buffer, queries: usize, rows: usize, dim: usize) -> Scratch<'a> {
        let (narrow, wide) = (dim.next_multiple_of(LANES), dim.next_multiple_of(PANEL));
        // Every part is a whole number of cache lines.
        let rows = rows.next_multiple_of(LANES);
        let lengths = [
            queries.next_multiple_of(LANES),
            narrow * BLOCK,
            wide * BLOCK,
            MAX_TILE_ROWS * BLOCK,
            rows * wide,
            rows,
            rows,
            LANES * narrow,
        ];
        let mut rest = buffer.reserve::<f32>(lengths.iter().sum());
        let [queries, keys, values, scores, sums, peaks, weights, turning] = lengths.map(|len| {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(len);
            rest = others;
            part
        });
        Scratch { queries, keys, values, scores, sums, peaks, weights, turning }
    }
}

impl Work<'_> {
    #[inline(always)]
    fn attend<S: Simd>(self, s: S, scratch: &mut Buffer) {
        let Work { heads, qkv, task, .. } = self;
        let dim = heads.head_dim;
        let wide = dim.next_multiple_of(PANEL);
        let group = heads.group();
        let rows = task.tokens * group;
        let split = Split::new(rows, S::TILE_ROWS);
        let q_start = task.span.start as usize + task.first;
        let (first_block, end) = task.blocks(heads);
        let mut scratch = Scratch::new(scratch, packed_len(split, dim), rows, dim);

        for t in 0..split.tiles {
            // SAFETY: the tile's part of the packed queries ends with its slack. Rows of the tile are copied
            // one by one, since those of a token lie beside each other and those of the next in the next row.
            unsafe {
                let to = scratch.queries.as_mut_ptr().add(packed_offset(split, t, dim));
                let (first, height) = (split.first(t), split.height(t));
                // Outputs are not needed yet and have room for the tile's queries.
                let gathered = scratch.sums.as_mut_ptr();
                for i in 0..height {
                    let (token, head) = ((first + i) / group, (first + i) % group);
                    let row = qkv.row(task.span.row + task.first + token);
                    let from = &row[(task.kv_head * group + head) * dim..][..dim];
                    std::ptr::copy_nonoverlapping(from.as_ptr(), gathered.add(i * dim), dim);
                }
                pack_tile(s, height, dim, gathered, dim, heads.scale, to);
            }
        }
        scratch.sums[..rows * wide].fill(0.0);
        scratch.peaks[..rows].fill(f32::NEG_INFINITY);
        scratch.weights[..rows].fill(0.0);

        for block in first_block..end.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let filled = BLOCK.min(end - start);
            let more = start + BLOCK < end;
            let coming = if more { Some(Coming::new(self.place, start + BLOCK, end)) } else { self.then };
            // One tile goes through keys and values once, in places that the others do not share: so it can ask
            // for the next ones as it goes.
            let smooth = split.tiles == 1 && self.place.dtype == Dtype::F32 && dim == wide;
            let asked = coming.filter(|_| smooth);
            // SAFETY: the scratch parts have the sizes that `Scratch::new` gives them, and positions below
            // `end` lie in pages that `check` has found.
            let values = unsafe {
                let ahead = Ahead::new(coming, !smooth);
                match self.place.dtype {
                    Dtype::F32 => self.load_block::<S, f32>(s, start, filled, asked, ahead, &mut scratch),
                    Dtype::F16 => self.load_block::<S, F16>(s, start, filled, asked, ahead, &mut scratch),
                    Dtype::Bf16 => self.load_block::<S, Bf16>(s, start, filled, asked, ahead, &mut scratch),
                }
            };
            let keys = Keys::new(scratch.keys.as_ptr(), dim, asked);
            for t in 0..split.tiles {
                let (first, height) = (split.first(t), split.height(t));
                let tile_end = q_start + (first + height - 1) / group + 1;
                let tile_start = heads.first_seen(q_start + first / group);
                if tile_end <= start || tile_start >= start + BLOCK {
                    continue;
                }
                let seen = BLOCK.min(tile_end - start);
                // SAFETY: as above; a tile has at most `TILE_ROWS` rows.
                unsafe {
                    let queries = scratch.queries.as_ptr().add(packed_offset(split, t, dim));
                    let scores = scratch.scores.as_mut_ptr();
                    let sums = scratch.sums.as_mut_ptr().add(first * wide);
                    let product = Tile {
                        a: queries,
                        segments: keys.segments(),
                        b_panel: dim.next_multiple_of(LANES) * PANEL,
                        b_step: PANEL,
                        c: scores,
                        c_row: BLOCK,
                        fresh: true,
                        ahead: 0,
                        next_lines: Keys::NEXT_LINES,
                    };
                    tiles::<S, f32, PACKED>(s, height, seen.div_ceil(PANEL), product);
                    for i in 0..height {
                        let position = q_start + (first + i) / group;
                        let from = heads.first_seen(position).saturating_sub(start);
                        let to = (position + 1).saturating_sub(start).min(BLOCK);
                        let scale = soften(
                            s,
                            scratch.scores[i * BLOCK..].first_chunk_mut().expect("a row of scores"),
                            from..to,
                            &mut scratch.peaks[first + i],
                            &mut scratch.weights[first + i],
                        );
                        if scale != 1.0 {
                            rescale(s, &mut scratch.sums[(first + i) * wide..][..wide], scale);
                        }
                    }
                    values.multiply(s, height, seen, scores, sums);
                }
            }
        }

        for row in 0..rows {
            let (token, head) = (row / group, row % group);
            let at = (task.span.row + task.first + token) * heads.heads + task.kv_head * group + head;
            // SAFETY: the outputs of these tokens and heads belong to this task.
            let to = unsafe { std::slice::from_raw_parts_mut(self.to.get().add(at * dim), dim) };
            let scale = 1.0 / scratch.weights[row];
            for (to, x) in to.iter_mut().zip(&scratch.sums[row * wide..]) {
                *to = x * scale;
            }
        }
    }

    /// Turns the keys of a block, and finds its values, or copies them where they are not whole panels of
    /// f32. Values that are found where they lie ask for values of the block that is `asked` for.
    ///
    /// # Safety
    /// Pages hold these positions, and the scratch has room for a block.
    #[inline(always)]
    unsafe fn load_block<S: Simd, E: Element>(
        &self,
        s: S,
        start: usize,
        filled: usize,
        asked: Option<Coming<'_>>,
        mut ahead: Ahead,
        scratch: &mut Scratch<'_>,
    ) -> Values {
        let dim = self.heads.head_dim;
        let (narrow, wide) = (dim.next_multiple_of(LANES), dim.next_multiple_of(PANEL));
        let Scratch { keys, values, turning, .. } = scratch;
        let mut found = Values { segments: [Segment::new(std::ptr::null(), 0); BLOCK], count: 0, wide };
        for base in (0..filled).step_by(LANES) {
            let mut from = (turning.as_ptr(), narrow);
            let mut i = base;
            let end = (base + LANES).min(filled);
            while i < end {
                // As many as lie in one page.
                let (k, v, run) = self.place.rows_at(start + i);
                let (k, v, run) = (k.cast::<E>(), v.cast::<E>(), run.min(end - i));
                match E::as_f32(v) {
                    Some(v) if dim == wide => {
                        // Half as many rows as it has itself, after those that the scores ask for.
                        let next = asked.map_or(std::ptr::null(), |block| block.value(BLOCK / 2 + i / 2));
                        found.push(Segment { next, ..Segment::new(v, run) });
                    }
                    _ => {
                        found.push(Segment::new(values[i * wide..].as_ptr(), run));
                        for row in 0..run {
                            // SAFETY: the rows lie in the page; pages start at multiples of an element's size.
                            unsafe { copy_row(s, v.add(row * dim), &mut values[(i + row) * wide..][..dim]) };
                        }
                    }
                }
                match E::as_f32(k) {
                    Some(keys) if run == LANES && dim == narrow => from = (keys, dim),
                    _ => {
                        for row in 0..run {
                            // SAFETY: as above.
                            unsafe {
                                copy_row(
                                    s,
                                    k.add(row * dim),
                                    &mut turning[(i - base + row) * narrow..][..dim],
                                )
                            };
                        }
                    }
                }
                i += run;
            }
            // Positions that are not filled leave what an earlier block left: their scores are masked.
            for column in (0..narrow).step_by(LANES) {
                ahead.prefetch(s, filled.div_ceil(LANES) * (narrow / LANES));
                // SAFETY: sixteen rows, of `turning` or of a page; the block's keys have `narrow` rows for each
                // half.
                unsafe {
                    let to = keys.as_mut_ptr().add((base / PANEL * narrow + column) * PANEL + base % PANEL);
                    s.transpose(from.0.add(column), from.1, to, PANEL);
                }
            }
        }
        found
    }
}

/// Pieces of [`Ahead`]: a block's keys and values in pages of sixteen tokens or more.
const AHEAD_PIECES: usize = 2 * BLOCK / LANES;

/// What the turning of keys asks for: keys, and values too where nothing else asks for them.
struct Ahead {
    pieces: [(*const u8, usize); AHEAD_PIECES],
    count: usize,
    step: usize,
}

impl Ahead {
    #[inline(always)]
    fn new(coming: Option<Coming<'_>>, values: bool) -> Ahead {
        let mut ahead = Ahead { pieces: [(std::ptr::null(), 0); AHEAD_PIECES], count: 0, step: 0 };
        let Some(Coming { place, start, end }) = coming else { return ahead };
        let mut position = start;
        while position < end && ahead.count + 2 <= AHEAD_PIECES {
            let (k, v, run) = place.rows_at(position);
            let run = run.min(end - position);
            ahead.pieces[ahead.count] = (k, run * place.row_bytes());
            ahead.count += 1;
            if values {
                ahead.pieces[ahead.count] = (v, run * place.row_bytes());
                ahead.count += 1;
            }
            position += run;
        }
        ahead
    }

    /// Asks for one part of `steps`.
    #[inline(always)]
    fn prefetch<S: Simd>(&mut self, s: S, steps: usize) {
        for (piece, bytes) in &self.pieces[..self.count] {
            let from = bytes * self.step / steps;
            let to = bytes * (self.step + 1) / steps;
            for at in (from.next_multiple_of(CACHE_LINE)..to).step_by(CACHE_LINE) {
                s.prefetch(piece.wrapping_add(at));
            }
        }
        self.step += 1;
    }
}

/// The turned keys of a block, in segments that ask for the first half of the next values as they are multiplied.
struct Keys {
    segments: [Segment<f32>; BLOCK / 2],
    count: usize,
}

impl Keys {
    /// A segment has a step for each number of a head: half a block of single precision is two lines for each.
    const NEXT_LINES: usize = BLOCK / 2 * size_of::<f32>() / CACHE_LINE;

    #[inline(always)]
    fn new(keys: *const f32, dim: usize, asked: Option<Coming<'_>>) -> Keys {
        let mut found = Keys { segments: [Segment::new(keys, dim); BLOCK / 2], count: 1 };
        let Some(coming) = asked else { return found };
        found.count = 0;
        let mut row = 0;
        while row < BLOCK / 2 {
            let run = coming.run(row).min(BLOCK / 2 - row);
            // Heads are whole panels here, so rows are whole lines and half a block's steps divide evenly.
            let (first, steps) = (row * dim / (BLOCK / 2), run * dim / (BLOCK / 2));
            let segment = Segment::new(keys.wrapping_add(first * PANEL), steps);
            found.segments[found.count] = Segment { next: coming.value(row), ..segment };
            found.count += 1;
            row += run;
        }
        found
    }

    #[inline(always)]
    fn segments(&self) -> &[Segment<f32>] {
        &self.segments[..self.count]
    }
}

/// The values of a block.
struct Values {
    /// Where they lie in the pages, or in the scratch memory if they were copied.
    segments: [Segment<f32>; BLOCK],
    count: usize,
    /// Numbers of a row.
    wide: usize,
}

impl Values {
    #[inline(always)]
    fn push(&mut self, segment: Segment<f32>) {
        self.segments[self.count] = segment;
        self.count += 1;
    }

    /// Adds the values of the first `seen` positions, weighted by the rows of `weights`, to `sums`.
    ///
    /// # Safety
    /// `weights` has `height` rows of a block, `sums` as many of `wide` numbers, and `seen` positions were
    /// found.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(
        &self,
        s: S,
        height: usize,
        seen: usize,
        weights: *const f32,
        sums: *mut f32,
    ) {
        let mut segments = self.segments;
        let (mut count, mut left) = (0, seen);
        while left > 0 {
            segments[count].steps = segments[count].steps.min(left);
            left -= segments[count].steps;
            count += 1;
        }
        let wide = self.wide;
        let product = Tile {
            a: weights,
            segments: &segments[..count],
            b_panel: PANEL,
            b_step: wide,
            c: sums,
            c_row: wide,
            fresh: false,
            ahead: 0,
            // See [`Work::load_block`]: for each position half a row.
            next_lines: wide * size_of::<f32>() / CACHE_LINE / 2,
        };
        // SAFETY: by the caller's promise.
        unsafe { tiles::<S, f32, BLOCK>(s, height, wide / PANEL, product) };
    }
}

/// A row of KV as f32.
///
/// # Safety
/// `to.len()` numbers can be read at `from`.
#[inline(always)]
unsafe fn copy_row<S: Simd, E: Element>(s: S, from: *const E, to: &mut [f32]) {
    let (vectors, rest) = to.as_chunks_mut::<LANES>();
    let done = vectors.len() * LANES;
    // SAFETY: by the caller's promise.
    unsafe {
        for (i, to) in vectors.iter_mut().enumerate() {
            s.store(to.as_mut_ptr(), E::load(s, from.add(i * LANES)));
        }
        for (i, to) in rest.iter_mut().enumerate() {
            *to = (*from.add(done + i)).to_f32();
        }
    }
}

/// Turns a row's scores into weights relative to its greatest score so far; positions outside `seen` weigh
/// nothing. Returns what earlier sums are to be multiplied by.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    scores: &mut [f32; BLOCK],
    seen: std::ops::Range<usize>,
    peak: &mut f32,
    weight: &mut f32,
) -> f32 {
    if seen.start >= seen.end {
        scores.fill(0.0);
        return 1.0;
    }
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let parts = scores.as_mut_ptr();
    // SAFETY: a block is four vectors.
    unsafe {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| i * LANES);
        let low = s.max(s.load(parts.add(a)), s.load(parts.add(b)));
        let high = s.max(s.load(parts.add(c)), s.load(parts.add(d)));
        let block_peak = max_lane(s, s.max(low, high));
        let new_peak = if block_peak > *peak { block_peak } else { *peak };
        let offset = s.splat(new_peak);
        let mut total = s.splat(0.0);
        for i in [a, b, c, d] {
            let w = exp(s, s.sub(s.load(parts.add(i)), offset));
            s.store(parts.add(i), w);
            total = s.add(total, w);
        }
        let total = sum(s, total);
        let scale = if new_peak == *peak { 1.0 } else { s.to_array(exp(s, s.splat(*peak - new_peak)))[0] };
        *weight = weight.mul_add(scale, total);
        *peak = new_peak;
        scale
    }
}

#[inline(always)]
fn rescale<S: Simd>(s: S, sums: &mut [f32], scale: f32) {
    for part in sums.as_chunks_mut::<LANES>().0 {
        // SAFETY: the chunk is one vector.
        unsafe { s.store(part.as_mut_ptr(), s.mul(s.load(part.as_ptr()), s.splat(scale))) };
    }
}
