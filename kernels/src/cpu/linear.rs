//! Matrix products.
//!
//! A weight matrix is packed into panels of 32 outputs, `[panel][input][32]`, in its own dtype. Every output
//! is one chain of fused multiply-adds over the inputs in order, whatever else is computed beside it: lanes
//! run over outputs, accumulators over rows, and a chain that is interrupted goes on from the stored partial
//! sum. So the same row gives the same bits alone and among thousands.

use super::Cpu;
use super::activation::swiglu;
use super::buffer::{Buffer, Rows, Shared};
use super::element::{Bf16, Dtype, Element, F16, read_f32};
use super::simd::{LANES, Op, Simd};
use std::cell::RefCell;

/// Outputs of a panel: two vectors.
pub(crate) const PANEL: usize = 2 * LANES;
/// Rows of the largest tile of any instruction set.
pub(crate) const MAX_TILE_ROWS: usize = 14;
/// Inputs of one pass when there are many rows: a panel of so many, as f32, stays in the second-level cache
/// beside the rows.
const PASS_INPUTS: usize = 1024;
/// Bytes of packed rows that one task goes through for each panel: about half a second-level cache.
const BLOCK_BYTES: usize = 1 << 20;
/// How far ahead weights are asked for: the time of a trip to memory at the rate of its arrival.
const AHEAD_BYTES: usize = 2048;
pub(crate) const CACHE_LINE: usize = 64;
/// Tiles up to which a panel is not worth a copy as f32.
const FEW_TILES: usize = 3;
/// Panels that one task goes through, at most: while one is multiplied, the next is fetched.
const TASK_PANELS: usize = 4;
/// Multiply-adds below which a second thread costs more than it gives.
const ALONE: usize = 1 << 15;

/// A packed weight matrix with its bias.
pub struct Matrix {
    data: Buffer,
    dtype: Dtype,
    inputs: usize,
    /// Rows of the weight, all parts together.
    outputs: usize,
    /// Width of what [`linear`] gives: `outputs`, or half of it for a gated pair.
    width: usize,
    gated: bool,
    /// One number for each column of the panels, or none.
    bias: Vec<f32>,
}

/// A weight as it lies in a file: `[outputs][inputs]`, little endian.
#[derive(Clone, Copy)]
pub struct MatrixPart<'a> {
    /// The numbers.
    pub data: &'a [u8],
    /// How they are stored.
    pub dtype: Dtype,
    /// Rows.
    pub outputs: usize,
    /// One number for each row, stored as the dtype beside it.
    pub bias: Option<(&'a [u8], Dtype)>,
}

/// What becomes of a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Epilogue {
    /// It is stored.
    Store,
    /// It is added to what is there.
    Add,
}

impl Matrix {
    /// Packs `parts`, whose outputs follow one another.
    ///
    /// # Panics
    /// When a part's length is not `outputs * inputs`.
    #[must_use]
    pub fn pack(cpu: &Cpu, parts: &[MatrixPart<'_>], inputs: usize) -> Matrix {
        let outputs = parts.iter().map(|p| p.outputs).sum();
        let starts: Vec<usize> = parts
            .iter()
            .scan(0, |start, p| {
                *start += p.outputs;
                Some(*start)
            })
            .collect();
        let source = |column: usize| {
            let part = starts.partition_point(|end| *end <= column);
            (part < parts.len()).then(|| (part, column + parts[part].outputs - starts[part]))
        };
        Matrix::pack_columns(cpu, parts, inputs, outputs, outputs.div_ceil(PANEL), false, source)
    }

    /// Packs a gate and its up projection so that [`linear`] gives `silu(gate) * up` at once: sixteen
    /// columns of the one beside sixteen of the other in every panel.
    ///
    /// # Panics
    /// When the two differ in outputs, or a length is not `outputs * inputs`.
    #[must_use]
    pub fn pack_gated(cpu: &Cpu, gate: MatrixPart<'_>, up: MatrixPart<'_>, inputs: usize) -> Matrix {
        assert_eq!(gate.outputs, up.outputs);
        let width = gate.outputs;
        let source = |column: usize| {
            let (panel, lane) = (column / PANEL, column % PANEL);
            let row = panel * LANES + lane % LANES;
            (row < width).then_some((lane / LANES, row))
        };
        Matrix::pack_columns(cpu, &[gate, up], inputs, 2 * width, width.div_ceil(LANES), true, source)
    }

    fn pack_columns(
        cpu: &Cpu,
        parts: &[MatrixPart<'_>],
        inputs: usize,
        outputs: usize,
        panels: usize,
        gated: bool,
        source: impl Fn(usize) -> Option<(usize, usize)> + Sync,
    ) -> Matrix {
        for part in parts {
            assert_eq!(part.data.len(), part.outputs * inputs * part.dtype.size_bytes());
        }
        let dtype = match parts.first() {
            Some(first) if parts.iter().all(|p| p.dtype == first.dtype) => first.dtype,
            _ => Dtype::F32,
        };
        let mut bias = Vec::new();
        if parts.iter().any(|p| p.bias.is_some()) {
            bias = (0..panels * PANEL)
                .map(|column| {
                    let (part, row) = source(column)?;
                    parts[part].bias.map(|(data, dtype)| read_f32(dtype, data, row))
                })
                .map(Option::unwrap_or_default)
                .collect();
        }
        let mut data = Buffer::new();
        let fill = Fill { cpu, parts, inputs, panels, source: &source };
        match dtype {
            Dtype::F32 => fill.pack::<f32>(&mut data, |part, i| read_f32(part.dtype, part.data, i)),
            Dtype::F16 => fill
                .pack(&mut data, |part, i| F16(u16::from_le_bytes([part.data[2 * i], part.data[2 * i + 1]]))),
            Dtype::Bf16 => {
                fill.pack(&mut data, |part, i| {
                    Bf16(u16::from_le_bytes([part.data[2 * i], part.data[2 * i + 1]]))
                });
            }
        }
        let width = if gated { outputs / 2 } else { outputs };
        Matrix { data, dtype, inputs, outputs, width, gated, bias }
    }

    /// Width of the rows that it takes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Width of the rows that it gives.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes of the packed weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.panels() * PANEL * self.inputs * self.dtype.size_bytes()
    }

    /// Row `output` of the weight, as f32: a tied output matrix is the embedding too.
    ///
    /// # Panics
    /// When there is no such row, or the matrix is gated.
    pub fn unpack_row(&self, output: usize, to: &mut [f32]) {
        assert!(output < self.outputs && !self.gated && to.len() == self.inputs);
        match self.dtype {
            Dtype::F32 => self.unpack::<f32>(output, to),
            Dtype::F16 => self.unpack::<F16>(output, to),
            Dtype::Bf16 => self.unpack::<Bf16>(output, to),
        }
    }

    fn unpack<E: Element>(&self, output: usize, to: &mut [f32]) {
        let panel = &self.elements::<E>()[output / PANEL * PANEL * self.inputs..];
        let slot = E::panel_slot(output % PANEL);
        for (to, row) in to.iter_mut().zip(panel.as_chunks::<PANEL>().0) {
            *to = row[slot].to_f32();
        }
    }

    /// Where number `index` of the packed weights begins, in bytes from the first.
    #[inline(always)]
    fn line(&self, index: usize) -> usize {
        index * self.dtype.size_bytes()
    }

    /// The address of a byte of the packed weights, to be asked for ahead.
    #[inline(always)]
    fn byte(&self, offset: usize) -> *const u8 {
        self.data.start().wrapping_add(offset)
    }

    fn panels(&self) -> usize {
        self.width.div_ceil(self.panel_width())
    }

    fn panel_width(&self) -> usize {
        if self.gated { LANES } else { PANEL }
    }

    fn elements<E: Element>(&self) -> &[E] {
        self.data.slice(self.panels() * PANEL * self.inputs)
    }
}

struct Fill<'a, F> {
    cpu: &'a Cpu,
    parts: &'a [MatrixPart<'a>],
    inputs: usize,
    panels: usize,
    source: &'a F,
}

impl<F: Fn(usize) -> Option<(usize, usize)> + Sync> Fill<'_, F> {
    fn pack<E: Element>(&self, data: &mut Buffer, read: impl Fn(&MatrixPart<'_>, usize) -> E + Sync) {
        let len = PANEL * self.inputs;
        // Columns without a source keep the zeros that the buffer starts with.
        let all = Shared::new(data.reserve::<E>(self.panels * len));
        self.cpu.team.run(self.panels, |panel| {
            // SAFETY: each task has a panel of its own, and the buffer holds `panels` of them.
            let to = unsafe { std::slice::from_raw_parts_mut(all.get().add(panel * len), len) };
            for lane in 0..PANEL {
                let Some((part, row)) = (self.source)(panel * PANEL + lane) else { continue };
                let part = &self.parts[part];
                let slot = E::panel_slot(lane);
                for input in 0..self.inputs {
                    to[input * PANEL + slot] = read(part, row * self.inputs + input);
                }
            }
        });
    }
}

/// A stretch of the second operand: `steps` steps from `b` on.
#[derive(Clone, Copy)]
pub(crate) struct Segment<E> {
    pub(crate) b: *const E,
    pub(crate) steps: usize,
    /// What to ask memory for, [`Tile::next_lines`] at each step, because it comes next; null for nothing.
    pub(crate) next: *const u8,
}

impl<E> Segment<E> {
    #[inline(always)]
    pub(crate) fn new(b: *const E, steps: usize) -> Segment<E> {
        Segment { b, steps, next: std::ptr::null() }
    }
}

/// Where the operands of [`tiles`] lie. Strides are in elements.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, E> {
    /// The rows, packed as `[step][row]`, or one after the other, as [`tiles`] is told.
    pub(crate) a: *const f32,
    /// The columns, step after step. Panel p's 32 numbers for step k of a segment are at
    /// `b[p * b_panel + k * b_step]`.
    pub(crate) segments: &'a [Segment<E>],
    pub(crate) b_panel: usize,
    pub(crate) b_step: usize,
    /// Row r's results for panel p are at `c[r * c_row + p * 32]`.
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// Start from zero rather than from what is in `c`.
    pub(crate) fresh: bool,
    /// Ask for the second operand so many bytes before it is needed: for what comes from memory in order.
    /// The machine's own prefetcher stops at the ends of 4 KiB pages. None if zero.
    pub(crate) ahead: usize,
    /// Cache lines of each segment's `next` to ask for at each step.
    pub(crate) next_lines: usize,
}

/// The stride that [`tiles`] takes for rows packed as `[step][row]`.
pub(crate) const PACKED: usize = 0;

/// Multiplies up to a tile of rows by `panels` panels, each result one chain over all segments. Rows lie
/// `ROW` apart, or are [`PACKED`].
///
/// # Safety
/// Everything that `t` names can be read, and its results written.
#[inline(always)]
pub(crate) unsafe fn tiles<S: Simd, E: Element, const ROW: usize>(
    s: S,
    rows: usize,
    panels: usize,
    t: Tile<'_, E>,
) {
    let mut panel = 0;
    while panel < panels {
        let wide = wide_panels(rows, S::TILE_ROWS);
        let left = panels - panel;
        let taken = if left >= wide {
            wide
        } else if left >= 2 && wide > 2 {
            2
        } else {
            1
        };
        let t = Tile { c: t.c.wrapping_add(panel * PANEL), ..t };
        let skip = panel * t.b_panel;
        // SAFETY: the caller's promise covers `taken` panels from here.
        unsafe {
            match (taken, rows) {
                (6, _) => tile::<S, E, 1, 6, ROW>(s, t, skip),
                (4, _) => tile::<S, E, 2, 4, ROW>(s, t, skip),
                (2, 1) => tile::<S, E, 1, 2, ROW>(s, t, skip),
                (2, 2) => tile::<S, E, 2, 2, ROW>(s, t, skip),
                (2, 3) => tile::<S, E, 3, 2, ROW>(s, t, skip),
                (2, 4) => tile::<S, E, 4, 2, ROW>(s, t, skip),
                (2, 5) => tile::<S, E, 5, 2, ROW>(s, t, skip),
                (2, 6) => tile::<S, E, 6, 2, ROW>(s, t, skip),
                (2, 7) => tile::<S, E, 7, 2, ROW>(s, t, skip),
                (1, 1) => tile::<S, E, 1, 1, ROW>(s, t, skip),
                (1, 2) => tile::<S, E, 2, 1, ROW>(s, t, skip),
                (1, 3) => tile::<S, E, 3, 1, ROW>(s, t, skip),
                (1, 4) => tile::<S, E, 4, 1, ROW>(s, t, skip),
                (1, 5) => tile::<S, E, 5, 1, ROW>(s, t, skip),
                (1, 6) => tile::<S, E, 6, 1, ROW>(s, t, skip),
                (1, 7) => tile::<S, E, 7, 1, ROW>(s, t, skip),
                (1, 8) => tile::<S, E, 8, 1, ROW>(s, t, skip),
                (1, 9) => tile::<S, E, 9, 1, ROW>(s, t, skip),
                (1, 10) => tile::<S, E, 10, 1, ROW>(s, t, skip),
                (1, 11) => tile::<S, E, 11, 1, ROW>(s, t, skip),
                (1, 12) => tile::<S, E, 12, 1, ROW>(s, t, skip),
                (1, 13) => tile::<S, E, 13, 1, ROW>(s, t, skip),
                (1, 14) => tile::<S, E, 14, 1, ROW>(s, t, skip),
                (taken, rows) => unreachable!("no tile of {rows} rows by {taken} panels"),
            }
        }
        panel += taken;
    }
}

/// Panels to take at once: enough chains to hide the latency of one, few enough that all accumulators stay
/// in registers.
#[inline(always)]
pub(crate) fn wide_panels(rows: usize, tile_rows: usize) -> usize {
    match (rows, tile_rows) {
        (1, 8..) => 6,
        (2, 8..) => 4,
        (3..=7, 8..) => 2,
        (1, _) => 2,
        _ => 1,
    }
}

/// The innermost loop: R rows by P panels, which begin `skip` elements into each segment.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const R: usize, const P: usize, const ROW: usize>(
    s: S,
    t: Tile<'_, E>,
    skip: usize,
) {
    if R > S::TILE_ROWS {
        unreachable!("a tile of {R} rows");
    }
    let (a_row, a_step) = if ROW == PACKED { (1, R) } else { (ROW, 1) };
    // SAFETY: the caller's promise covers every address below.
    unsafe {
        let zero = s.splat(0.0);
        let mut acc = [[(zero, zero); P]; R];
        if !t.fresh {
            for (r, row) in acc.iter_mut().enumerate() {
                for (p, cell) in row.iter_mut().enumerate() {
                    let c = t.c.add(r * t.c_row + p * PANEL);
                    *cell = (s.load(c), s.load(c.add(LANES)));
                }
            }
        }
        let mut a = t.a;
        for segment in t.segments {
            let mut b = segment.b.add(skip);
            let mut next = segment.next;
            for _ in 0..segment.steps {
                let mut columns = [(zero, zero); P];
                for (p, column) in columns.iter_mut().enumerate() {
                    let b = b.add(p * t.b_panel);
                    *column = E::load_panel(s, b);
                    if t.ahead > 0 {
                        for line in (0..PANEL * size_of::<E>()).step_by(CACHE_LINE) {
                            s.prefetch(b.cast::<u8>().wrapping_add(t.ahead + line));
                        }
                    }
                }
                for (r, row) in acc.iter_mut().enumerate() {
                    let x = s.splat(*a.add(r * a_row));
                    for (cell, column) in row.iter_mut().zip(&columns) {
                        cell.0 = s.fma(x, column.0, cell.0);
                        cell.1 = s.fma(x, column.1, cell.1);
                    }
                }
                // Once, however many passes the panels take.
                if skip == 0 && !next.is_null() {
                    for _ in 0..t.next_lines {
                        s.prefetch(next);
                        next = next.wrapping_add(CACHE_LINE);
                    }
                }
                a = a.add(a_step);
                b = b.add(t.b_step);
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (p, cell) in row.iter().enumerate() {
                let c = t.c.add(r * t.c_row + p * PANEL);
                s.store(c, cell.0);
                s.store(c.add(LANES), cell.1);
            }
        }
    }
}

/// Splits `rows` into tiles of nearly equal height: (tiles, smallest height, how many are one higher).
#[derive(Clone, Copy)]
pub(crate) struct Split {
    pub(crate) tiles: usize,
    base: usize,
    higher: usize,
}

impl Split {
    #[inline(always)]
    pub(crate) fn new(rows: usize, tallest: usize) -> Split {
        let tiles = rows.div_ceil(tallest).max(1);
        Split { tiles, base: rows / tiles, higher: rows % tiles }
    }
    #[inline(always)]
    pub(crate) fn first(self, tile: usize) -> usize {
        tile * self.base + tile.min(self.higher)
    }
    #[inline(always)]
    pub(crate) fn height(self, tile: usize) -> usize {
        self.base + usize::from(tile < self.higher)
    }
}

/// Numbers between the packed rows of two tiles, which transposing may overwrite.
const SLACK: usize = LANES;

/// Where tile `tile` starts among packed rows of `inputs` numbers.
#[inline(always)]
pub(crate) fn packed_offset(split: Split, tile: usize, inputs: usize) -> usize {
    split.first(tile) * inputs + tile * SLACK
}

/// Length of [`packed_offset`]'s buffer.
pub(crate) fn packed_len(split: Split, inputs: usize) -> usize {
    packed_offset(split, split.tiles, inputs)
}

/// Packs `height` rows of `width` numbers, `from_row` apart, as `[number][row]`, times `scale`.
///
/// # Safety
/// The rows can be read, and `height * width + 16` numbers written.
#[inline(always)]
pub(crate) unsafe fn pack_tile<S: Simd>(
    s: S,
    height: usize,
    width: usize,
    from: *const f32,
    from_row: usize,
    scale: f32,
    to: *mut f32,
) {
    let mut block = [0.0f32; LANES * LANES];
    let mut column = 0;
    // SAFETY: rows and columns stay below height and width; the last full store of a block writes at most
    // 16 - height numbers past the end, which the caller allows.
    unsafe {
        while column + LANES <= width {
            // Rows below the tile's height only: the others of the block hold what they held before.
            for row in 0..height {
                let x = s.mul(s.load(from.add(row * from_row + column)), s.splat(scale));
                s.store(block.as_mut_ptr().add(row * LANES), x);
            }
            let mut turned = [0.0f32; LANES * LANES];
            s.transpose(block.as_ptr(), LANES, turned.as_mut_ptr(), LANES);
            for i in 0..LANES {
                s.store(to.add((column + i) * height), s.load(turned.as_ptr().add(i * LANES)));
            }
            column += LANES;
        }
        for column in column..width {
            for row in 0..height {
                *to.add(column * height + row) = *from.add(row * from_row + column) * scale;
            }
        }
    }
}

thread_local! {
    /// A panel as f32, and partial sums.
    static SCRATCH: RefCell<(Buffer, Buffer)> = const { RefCell::new((Buffer::new(), Buffer::new())) };
    /// Packed rows, of the thread that calls [`linear`].
    static PACKED_ROWS: RefCell<Buffer> = const { RefCell::new(Buffer::new()) };
}

/// `out = x * weight^T + bias`, or the same added to `out`. A gated pair gives `silu(gate) * up`.
///
/// # Panics
/// When widths do not fit, or `out` is to be added to and has another size.
pub fn linear(cpu: &Cpu, x: &Rows, weight: &Matrix, epilogue: Epilogue, out: &mut Rows) {
    assert_eq!(x.width(), weight.inputs);
    match epilogue {
        Epilogue::Store => out.reshape(x.rows(), weight.width),
        Epilogue::Add => assert_eq!((out.rows(), out.width()), (x.rows(), weight.width)),
    }
    if x.rows() == 0 || weight.width == 0 {
        return;
    }
    let out = Shared::new(out.data_mut());
    PACKED_ROWS.with_borrow_mut(|packed| {
        cpu.isa.run(Product { cpu, x, weight, epilogue, out, packed });
    });
}

struct Product<'a> {
    cpu: &'a Cpu,
    x: &'a Rows,
    weight: &'a Matrix,
    epilogue: Epilogue,
    out: Shared<f32>,
    packed: &'a mut Buffer,
}

impl Op for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Product { cpu, x, weight, epilogue, out, packed } = self;
        let rows = x.rows();
        let split = Split::new(rows, S::TILE_ROWS);
        let small = rows * weight.inputs * weight.panels() * PANEL <= ALONE;
        let inputs = weight.inputs;
        // A single row is packed as it is.
        let a: *const f32 = if rows == 1 {
            x.data().as_ptr()
        } else {
            let to = Shared::new(packed.reserve::<f32>(packed_len(split, inputs)));
            let group = if small { split.tiles } else { (1 << 14) / (inputs * S::TILE_ROWS).max(1) + 1 };
            cpu.team.run(split.tiles.div_ceil(group), |task| {
                let tiles = task * group..((task + 1) * group).min(split.tiles);
                cpu.isa.run(PackRows { x, split, tiles, to });
            });
            to.get()
        };
        let job = Job { split, a: Shared::new_const(a), weight, epilogue, out };
        if split.tiles <= FEW_TILES {
            let wide = wide_panels(split.height(0), S::TILE_ROWS);
            let groups = weight.panels().div_ceil(wide);
            let tasks = if small { 1 } else { groups.min(cpu.team.threads() * 8) };
            cpu.team.run(tasks, |task| {
                let groups = groups * task / tasks..groups * (task + 1) / tasks;
                let panels = groups.start * wide..(groups.end * wide).min(weight.panels());
                cpu.isa.run(FewRows { job, panels });
            });
        } else {
            let tile_bytes = 4 * inputs * S::TILE_ROWS;
            let blocks = Split::new(split.tiles, (BLOCK_BYTES / tile_bytes).max(1));
            // Enough groups that threads which end early find more to do.
            let panels = weight.panels();
            let at_once = (blocks.tiles * panels / (8 * cpu.team.threads())).clamp(1, TASK_PANELS);
            let groups = Split::new(panels, at_once);
            cpu.team.run(blocks.tiles * groups.tiles, |task| {
                let (block, group) = (task / groups.tiles, task % groups.tiles);
                let tiles = blocks.first(block)..blocks.first(block) + blocks.height(block);
                let panels = groups.first(group)..groups.first(group) + groups.height(group);
                SCRATCH.with_borrow_mut(|scratch| cpu.isa.run(ManyRows { job, tiles, panels, scratch }));
            });
        }
    }
}

impl<T> Shared<T> {
    /// A shared pointer that is only read.
    fn new_const(from: *const T) -> Shared<T> {
        // SAFETY: an empty slice may be made of any pointer that is aligned and not null.
        Shared::new(unsafe { std::slice::from_raw_parts_mut(from.cast_mut(), 0) })
    }
}

struct PackRows<'a> {
    x: &'a Rows,
    split: Split,
    tiles: std::ops::Range<usize>,
    to: Shared<f32>,
}

impl Op for PackRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.x.width();
        for tile in self.tiles {
            let from = &self.x.data()[self.split.first(tile) * inputs..];
            // SAFETY: the tile's rows lie in `x`; its place among the packed rows ends with the slack.
            unsafe {
                let to = self.to.get().add(packed_offset(self.split, tile, inputs));
                pack_tile(s, self.split.height(tile), inputs, from.as_ptr(), inputs, 1.0, to);
            }
        }
    }
}

/// What all tasks of a product share.
#[derive(Clone, Copy)]
struct Job<'a> {
    split: Split,
    a: Shared<f32>,
    weight: &'a Matrix,
    epilogue: Epilogue,
    out: Shared<f32>,
}

/// All rows, by a range of panels; weights become f32 in registers, for every tile again.
struct FewRows<'a> {
    job: Job<'a>,
    panels: std::ops::Range<usize>,
}

impl Op for FewRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.job.weight.dtype {
            Dtype::F32 => few_rows::<S, f32>(s, &self.job, self.panels),
            Dtype::F16 => few_rows::<S, F16>(s, &self.job, self.panels),
            Dtype::Bf16 => few_rows::<S, Bf16>(s, &self.job, self.panels),
        }
    }
}

#[inline(always)]
fn few_rows<S: Simd, E: Element>(s: S, job: &Job<'_>, panels: std::ops::Range<usize>) {
    let split = job.split;
    let wide = wide_panels(split.height(0), S::TILE_ROWS);
    let inputs = job.weight.inputs;
    let elements = job.weight.elements::<E>();
    let mut sums = [0.0f32; MAX_TILE_ROWS * PANEL];
    let mut panel = panels.start;
    while panel < panels.end {
        let taken = wide.min(panels.end - panel);
        let b = elements[panel * PANEL * inputs..].as_ptr();
        for tile in 0..split.tiles {
            let (first, height) = (split.first(tile), split.height(tile));
            // SAFETY: `a` holds the packed rows of every tile, `b` has `taken` panels, and `sums` has room:
            // `wide` times the tallest tile's rows is at most fourteen.
            unsafe {
                let t = Tile {
                    a: job.a.get().add(packed_offset(split, tile, inputs)),
                    segments: &[Segment::new(b, inputs)],
                    b_panel: PANEL * inputs,
                    b_step: PANEL,
                    c: sums.as_mut_ptr(),
                    c_row: taken * PANEL,
                    fresh: true,
                    ahead: AHEAD_BYTES,
                    next_lines: 0,
                };
                tiles::<S, E, PACKED>(s, height, taken, t);
            }
            for p in 0..taken {
                for row in 0..height {
                    finish(s, job, first + row, panel + p, &sums[(row * taken + p) * PANEL..]);
                }
            }
        }
        panel += taken;
    }
}

/// A range of tiles, by some panels, each of which becomes f32 once for all of them.
struct ManyRows<'a> {
    job: Job<'a>,
    tiles: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
    scratch: &'a mut (Buffer, Buffer),
}

impl Op for ManyRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ManyRows { job, tiles: range, panels, scratch: (wide, sums) } = self;
        let weight = job.weight;
        let inputs = weight.inputs;
        let pass = inputs.min(PASS_INPUTS);
        let first_row = job.split.first(range.start);
        let rows = job.split.first(range.end) - first_row;
        let wide = wide.reserve::<f32>(pass * PANEL);
        let sums = sums.reserve::<f32>(rows.max(MAX_TILE_ROWS) * PANEL);
        for (panel, start) in
            panels.clone().flat_map(|panel| (0..inputs).step_by(pass).map(move |k| (panel, k)))
        {
            let end = (start + pass).min(inputs);
            let part = (panel * inputs + start) * PANEL..(panel * inputs + end) * PANEL;
            let b = match weight.dtype {
                Dtype::F32 => f32::widen(s, &weight.elements()[part.clone()], wide),
                Dtype::F16 => F16::widen(s, &weight.elements()[part.clone()], wide),
                Dtype::Bf16 => Bf16::widen(s, &weight.elements()[part.clone()], wide),
            };
            // What follows is the next pass, or the next panel.
            let next = weight.line(part.end)
                ..weight.line(((part.end + part.len()) / PANEL).min(panels.end * inputs) * PANEL);
            let lines = Split::new(
                next.len().div_ceil(CACHE_LINE),
                next.len().div_ceil(CACHE_LINE * range.len()).max(1),
            );
            for (index, t) in range.clone().enumerate() {
                if index < lines.tiles {
                    for line in lines.first(index)..lines.first(index) + lines.height(index) {
                        s.prefetch(weight.byte(next.start + line * CACHE_LINE));
                    }
                }
                let (height, row) = (job.split.height(t), job.split.first(t));
                let sums = &mut sums[(row - first_row) * PANEL..];
                // SAFETY: the tile's packed rows from `start` on, a panel of `end - start` steps, and sums for
                // all rows of the tiles.
                unsafe {
                    let a =
                        job.a.get().add(packed_offset(job.split, t, inputs) + start * height).cast_const();
                    let t = Tile {
                        a,
                        segments: &[Segment::new(b, end - start)],
                        b_panel: 0,
                        b_step: PANEL,
                        c: sums.as_mut_ptr(),
                        c_row: PANEL,
                        fresh: start == 0,
                        ahead: 0,
                        next_lines: 0,
                    };
                    tiles::<S, f32, PACKED>(s, height, 1, t);
                }
                if end == inputs {
                    for i in 0..height {
                        finish(s, &job, row + i, panel, &sums[i * PANEL..]);
                    }
                }
            }
        }
    }
}

/// Bias, gate and epilogue for one row's part of a panel.
#[inline(always)]
fn finish<S: Simd>(s: S, job: &Job<'_>, row: usize, panel: usize, sums: &[f32]) {
    let weight = job.weight;
    let sums: &[f32; PANEL] = sums.first_chunk().expect("a panel of sums");
    let width = weight.panel_width();
    let valid = width.min(weight.width - panel * width);
    // SAFETY: `sums` has two vectors; the bias covers every column of every panel; `out` has `rows` rows of
    // `weight.width`, of which this panel's columns belong to this task. Where fewer columns than a vector
    // are left, they go through `last`.
    unsafe {
        let mut low = s.load(sums.as_ptr());
        let mut high = s.load(sums.as_ptr().add(LANES));
        if !weight.bias.is_empty() {
            let bias = weight.bias[panel * PANEL..][..PANEL].as_ptr();
            low = s.add(low, s.load(bias));
            high = s.add(high, s.load(bias.add(LANES)));
        }
        if weight.gated {
            low = swiglu(s, low, high);
        }
        let out = job.out.get().add(row * weight.width + panel * width);
        if valid == width {
            if job.epilogue == Epilogue::Add {
                low = s.add(s.load(out), low);
            }
            s.store(out, low);
            if !weight.gated {
                if job.epilogue == Epilogue::Add {
                    high = s.add(s.load(out.add(LANES)), high);
                }
                s.store(out.add(LANES), high);
            }
        } else {
            let mut last = [0.0f32; PANEL];
            s.store(last.as_mut_ptr(), low);
            s.store(last.as_mut_ptr().add(LANES), high);
            for (i, x) in last.iter().enumerate().take(valid) {
                let out = out.add(i);
                *out = if job.epilogue == Epilogue::Add { *out + x } else { *x };
            }
        }
    }
}
