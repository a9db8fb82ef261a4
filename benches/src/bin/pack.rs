//! How near do pack and scatter come to the memory's speed, and packing into another GPU's memory to the link's? One
//! run moves the KV of the 8B shape (32 layers, 8 heads of 128, bf16; pages of 16 tokens in random order), beside
//! copies of the same bytes.
//!
//! Every way's bytes are checked by their checksums, and those of one chunk against the CPU's.

use anyhow::{Context, bail, ensure};
use clap::Parser;
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tandem_benches::kv::{CHUNK_TOKENS, Gpu, Shape, fill, parts, set};
use tandem_kernels::cuda::{Chunk, DevicePages, Place, Share};
use tandem_kernels::{Order, checksum};
use tandem_memory::cuda::{Device, DeviceExtent, DeviceRegion, IpcHandle};
use tandem_proto::ids::PageId;

/// Measures pack and scatter on a GPU, and between two, beside copies.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Tokens of KV that are moved at once, 128 KiB each.
    #[arg(long, default_value_t = 8192)]
    tokens: u32,
    /// Samples of each figure. Medians are reported.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// The order of a page's rows: hnd or nhd.
    #[arg(long, default_value = "hnd", value_parser = order)]
    order: Order,
    /// Multiprocessors for what goes to another GPU.
    #[arg(long, default_value = "32")]
    multiprocessors: NonZeroU32,
    /// Where to write the figures, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The process that owns the other GPU's memory, which this program starts by itself.
    #[arg(long, hide = true)]
    own: Option<usize>,
}

fn order(text: &str) -> Result<Order, String> {
    match text {
        "hnd" => Ok(Order::Heads),
        "nhd" => Ok(Order::Tokens),
        _ => Err("hnd or nhd".to_owned()),
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    ensure!(
        options.tokens > 0 && options.tokens.is_multiple_of(CHUNK_TOKENS),
        "--tokens must be a multiple of {CHUNK_TOKENS}"
    );
    match options.own {
        Some(ordinal) => own(&options, ordinal),
        None => measure(&options),
    }
}

/// One figure of the table.
struct Figure {
    name: String,
    bytes: usize,
    us: Vec<f64>,
    /// The figure that this is held to, by name, and which part of its bandwidth it should have.
    bound: Option<(&'static str, f64)>,
}

impl Figure {
    fn median(&self) -> f64 {
        let mut us = self.us.clone();
        us.sort_by(f64::total_cmp);
        us[us.len() / 2]
    }

    fn rate(&self) -> f64 {
        self.bytes as f64 / self.median() / 1e3
    }
}

/// What is measured: a name, its bytes, its bound, and the work of one sample.
struct Way<'a> {
    name: String,
    bytes: usize,
    bound: Option<(&'static str, f64)>,
    work: Box<dyn FnMut(usize) -> anyhow::Result<()> + 'a>,
}

/// Runs all ways in turn, round after round, so that what disturbs the machine disturbs all alike.
fn interleave(gpu: &Gpu, rounds: usize, ways: &mut [Way<'_>]) -> anyhow::Result<Vec<Figure>> {
    const WARM: usize = 3;
    let mut figures: Vec<Figure> = ways
        .iter()
        .map(|way| Figure { name: way.name.clone(), bytes: way.bytes, us: Vec::new(), bound: way.bound })
        .collect();
    for round in 0..WARM + rounds {
        for (way, figure) in ways.iter_mut().zip(&mut figures) {
            let us = gpu.time(&mut || (way.work)(round))?;
            if round >= WARM {
                figure.us.push(us);
            }
        }
    }
    Ok(figures)
}

fn measure(options: &Options) -> anyhow::Result<()> {
    let shape = Shape::new(options.tokens, options.order);
    let gpu = Gpu::open(0)?;
    println!(
        "{}; {} tokens, {} MiB in {} chunks, {:?}",
        gpu.kernels.device().name(),
        shape.tokens,
        shape.bytes() >> 20,
        shape.chunks(),
        shape.layout.order
    );
    let source = DevicePages::new(shape.layout, gpu.take(shape.layout.bytes())?)?;
    fill(&gpu, source.storage())?;
    let pages = shape.pages(1);
    let sums = check(&gpu, &shape, &source, &pages)?;
    let mut figures = local(&gpu, &shape, &source, &pages, options)?;
    if Device::count()? > 1 {
        figures.extend(peer(&gpu, &shape, &source, &pages, &sums, options)?);
    } else {
        println!("skipped: there is no second GPU");
    }
    report(&figures, options)
}

/// The checksums of all chunks, after those of pack, scatter and the CPU were seen to agree.
fn check(gpu: &Gpu, shape: &Shape, source: &DevicePages, pages: &[PageId]) -> anyhow::Result<Vec<u64>> {
    let landing = gpu.take(shape.bytes())?;
    let places = parts(&landing, shape)?;
    let layers = 0..shape.layout.layers;
    let share = Share { checksum: true, multiprocessors: None };
    let mut plan = gpu.plan(shape)?;
    set(&mut plan, shape, pages, |i| Place::Packed(&places[i]))?;
    plan.pack(source, layers.clone(), share)?;
    let sums = plan.checksums(layers.clone())?;
    let len = shape.layout.layer_bytes(CHUNK_TOKENS);
    for (layer, chunk) in [(0, 0), (layers.end as usize - 1, shape.chunks() - 1)] {
        let mut packed = vec![0; len];
        places[chunk].part(layer * len..(layer + 1) * len)?.read(&gpu.stream, &mut packed)?;
        ensure!(checksum(&packed) == sums[layer * shape.chunks() + chunk], "the CPU has another checksum");
    }
    let target = DevicePages::new(shape.layout, gpu.take(shape.layout.bytes())?)?;
    plan.scatter(&target, layers.clone(), share)?;
    ensure!(plan.checksums(layers.clone())? == sums, "scatter has other checksums than pack");
    plan.digest(&target, layers.clone())?;
    ensure!(plan.checksums(layers)? == sums, "what was scattered has other checksums");
    Ok(sums)
}

fn local(
    gpu: &Gpu,
    shape: &Shape,
    source: &DevicePages,
    pages: &[PageId],
    options: &Options,
) -> anyhow::Result<Vec<Figure>> {
    let (landing, other) = (gpu.take(shape.bytes())?, gpu.take(shape.bytes())?);
    let places = parts(&landing, shape)?;
    let target = DevicePages::new(shape.layout, gpu.take(shape.layout.bytes())?)?;
    let (all, bytes, layers) = (0..shape.layout.layers, shape.bytes(), shape.layout.layers as usize);
    let layer = bytes / layers;
    let plain = Share::default();
    let summed = Share { checksum: true, ..plain };
    // Both ways of one plan need it exclusively, so each has its own.
    let plan = || {
        let mut plan = gpu.plan(shape)?;
        set(&mut plan, shape, pages, |i| Place::Packed(&places[i]))?;
        anyhow::Ok(plan)
    };
    let mut ways = vec![Way {
        name: "copy".to_owned(),
        bytes,
        bound: None,
        work: Box::new(|_| Ok(landing.copy_to(&gpu.stream, &other)?)),
    }];
    ways.push(Way {
        name: "copy of a layer".to_owned(),
        bytes: layer,
        bound: None,
        work: Box::new(|round| {
            let at = round % layers * layer;
            Ok(landing.part(at..at + layer)?.copy_to(&gpu.stream, &other.part(at..at + layer)?)?)
        }),
    });
    for (share, sum, part) in [(plain, "", 0.95), (summed, ", checksum", 0.9)] {
        let (mut pack, mut scatter) = (plan()?, plan()?);
        let (whole, source, target) = (all.clone(), source, &target);
        ways.push(Way {
            name: format!("pack{sum}"),
            bytes,
            bound: Some(("copy", part)),
            work: Box::new(move |_| Ok(pack.pack(source, whole.clone(), share)?)),
        });
        let whole = all.clone();
        ways.push(Way {
            name: format!("scatter{sum}"),
            bytes,
            bound: Some(("copy", part)),
            work: Box::new(move |_| Ok(scatter.scatter(target, whole.clone(), share)?)),
        });
        let (mut pack, mut scatter) = (plan()?, plan()?);
        ways.push(Way {
            name: format!("pack a layer{sum}"),
            bytes: layer,
            bound: Some(("copy of a layer", part)),
            work: Box::new(move |round| {
                let at = (round % layers) as u32;
                Ok(pack.pack(source, at..at + 1, share)?)
            }),
        });
        ways.push(Way {
            name: format!("scatter a layer{sum}"),
            bytes: layer,
            bound: Some(("copy of a layer", part)),
            work: Box::new(move |round| {
                let at = (round % layers) as u32;
                Ok(scatter.scatter(target, at..at + 1, share)?)
            }),
        });
    }
    let (mut digest, whole) = (plan()?, all.clone());
    ways.push(Way {
        name: "checksums of pages".to_owned(),
        bytes,
        bound: None,
        work: Box::new(move |_| Ok(digest.digest(source, whole.clone())?)),
    });
    let mut figures = interleave(gpu, options.rounds, &mut ways)?;
    figures.push(small(gpu, shape, source, pages, &landing)?);
    Ok(figures)
}

/// Sixteen tokens of all layers from the host's call until it has their checksums.
fn small(
    gpu: &Gpu,
    shape: &Shape,
    source: &DevicePages,
    pages: &[PageId],
    landing: &DeviceExtent,
) -> anyhow::Result<Figure> {
    let bytes = shape.layout.layer_bytes(16) * shape.layout.layers as usize;
    let place = landing.part(0..bytes)?;
    let mut plan = gpu.plan(shape)?;
    let layers = 0..shape.layout.layers;
    let mut us = Vec::new();
    for page in pages.iter().cycle().take(60) {
        let began = Instant::now();
        let chunk = Chunk { tokens: 16, pages: &[*page], place: Place::Packed(&place) };
        plan.set(&shape.layout, None, &[chunk])?;
        plan.pack(source, layers.clone(), Share { checksum: true, multiprocessors: None })?;
        plan.checksums(layers.clone())?;
        us.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Figure { name: "pack 16 tokens, call to checksums".to_owned(), bytes, us, bound: None })
}

/// The process that owns the other GPU's memory.
struct Owner {
    process: Child,
    lines: Box<dyn Iterator<Item = String>>,
}

impl Owner {
    fn start(options: &Options) -> anyhow::Result<Owner> {
        let order = if options.order == Order::Heads { "hnd" } else { "nhd" };
        let mut process = Command::new(std::env::current_exe()?)
            .args(["--own", "1", "--order", order, "--tokens", &options.tokens.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(process.stdout.take().context("a pipe")?).lines();
        Ok(Owner { process, lines: Box::new(lines.map_while(Result::ok)) })
    }

    fn hear(&mut self) -> anyhow::Result<String> {
        self.lines.next().context("the process that owns the other GPU's memory ended")
    }

    fn ask(&mut self, what: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.process.stdin.as_mut().context("a pipe")?, "{what}")?)
    }

    /// Nobody uses its memory any more.
    fn end(mut self) -> anyhow::Result<()> {
        drop(self.process.stdin.take());
        ensure!(self.process.wait()?.success(), "the process that owns the other GPU's memory failed");
        Ok(())
    }

    /// Waits until it has done what it was asked first.
    fn done(&mut self) -> anyhow::Result<()> {
        let said = self.hear()?;
        ensure!(said == "done", "the process that owns the other GPU's memory says: {said}");
        Ok(())
    }

    fn import(&mut self, gpu: &Gpu, len: usize) -> anyhow::Result<DeviceExtent> {
        let handle = self.hear()?.parse::<IpcHandle>().map_err(anyhow::Error::msg)?;
        Ok(DeviceRegion::import(gpu.kernels.device(), &handle, len)?.extent(0..len)?)
    }
}

fn peer(
    gpu: &Gpu,
    shape: &Shape,
    source: &DevicePages,
    pages: &[PageId],
    sums: &[u64],
    options: &Options,
) -> anyhow::Result<Vec<Figure>> {
    let mut owner = Owner::start(options)?;
    let landing = owner.import(gpu, shape.bytes())?;
    let there = DevicePages::new(shape.layout, owner.import(gpu, shape.layout.bytes())?)?;
    let there_pages = shape.pages(2);
    let places = parts(&landing, shape)?;
    let own = gpu.take(shape.bytes())?;
    let (all, bytes, layers) = (0..shape.layout.layers, shape.bytes(), shape.layout.layers as usize);
    let few = Some(options.multiprocessors);
    let per_chunk = (CHUNK_TOKENS / 16) as usize;
    let layer = bytes / layers;
    let mut ways = vec![Way {
        name: "copy to the peer".to_owned(),
        bytes,
        bound: None,
        work: Box::new(|_| Ok(own.copy_to(&gpu.stream, &landing)?)),
    }];
    ways.push(Way {
        name: "copy of a layer to the peer".to_owned(),
        bytes: layer,
        bound: None,
        work: Box::new(|round| {
            let at = round % layers * layer;
            Ok(own.part(at..at + layer)?.copy_to(&gpu.stream, &landing.part(at..at + layer)?)?)
        }),
    });
    for (most, on) in [(None, ""), (few, ", few multiprocessors")] {
        for (checksum, sum) in [(false, ""), (true, ", checksum")] {
            let share = Share { checksum, multiprocessors: most };
            let mut plans = Vec::new();
            for _ in 0..2 {
                let (mut packed, mut carried) = (gpu.plan(shape)?, gpu.plan(shape)?);
                set(&mut packed, shape, pages, |i| Place::Packed(&places[i]))?;
                set(&mut carried, shape, pages, |i| {
                    Place::Pages(&there_pages[i * per_chunk..(i + 1) * per_chunk])
                })?;
                plans.push((packed, carried));
            }
            let [(mut pack, mut carry), (mut pack_layer, mut carry_layer)] =
                <[_; 2]>::try_from(plans).ok().context("two")?;
            let (there, whole) = (&there, all.clone());
            ways.push(Way {
                name: format!("pack into the peer{sum}{on}"),
                bytes,
                bound: Some(("copy to the peer", 0.88)),
                work: Box::new(move |_| Ok(pack.pack(source, whole.clone(), share)?)),
            });
            let whole = all.clone();
            ways.push(Way {
                name: format!("pages to the peer's pages{sum}{on}"),
                bytes,
                bound: Some(("copy to the peer", 0.88)),
                work: Box::new(move |_| Ok(carry.carry(source, there, whole.clone(), share)?)),
            });
            ways.push(Way {
                name: format!("pack a layer into the peer{sum}{on}"),
                bytes: layer,
                bound: None,
                work: Box::new(move |round| {
                    let at = (round % layers) as u32;
                    Ok(pack_layer.pack(source, at..at + 1, share)?)
                }),
            });
            ways.push(Way {
                name: format!("a layer's pages to the peer's{sum}{on}"),
                bytes: layer,
                bound: None,
                work: Box::new(move |round| {
                    let at = (round % layers) as u32;
                    Ok(carry_layer.carry(source, there, at..at + 1, share)?)
                }),
            });
        }
    }
    let mut figures = interleave(gpu, options.rounds, &mut ways)?;
    drop(ways);
    for (most, on) in [(None, ""), (few, ", few multiprocessors")] {
        figures.push(Figure {
            name: format!("pages to the peer's pages, verified there{on}"),
            bytes,
            us: verified(gpu, shape, source, (pages, &there, &there_pages), sums, (&mut owner, most))?,
            bound: Some(("copy to the peer", 0.88)),
        });
    }
    drop((landing, there, places));
    owner.end()?;
    Ok(figures)
}

/// All pages to the peer's pages with checksums, which the peer compares with its own of what it has. Microseconds of
/// the clock from the first call to the peer's last word.
fn verified(
    gpu: &Gpu,
    shape: &Shape,
    source: &DevicePages,
    (pages, there, there_pages): (&[PageId], &DevicePages, &[PageId]),
    sums: &[u64],
    (owner, multiprocessors): (&mut Owner, Option<NonZeroU32>),
) -> anyhow::Result<Vec<f64>> {
    let per_chunk = (CHUNK_TOKENS / 16) as usize;
    // Two streams, so that a part begins while the last writes and the checksums of the one before are under way. On few
    // multiprocessors one: each stream would take as many.
    let mut plans = Vec::new();
    for _ in 0..if multiprocessors.is_none() { 2 } else { 1 } {
        let mut plan = gpu.beside()?.plan(shape)?;
        set(&mut plan, shape, pages, |i| Place::Pages(&there_pages[i * per_chunk..(i + 1) * per_chunk]))?;
        plans.push(plan);
    }
    // The peer compares some layers while others are under way, and has little left to do after the last.
    let mut parts = Vec::new();
    let mut from = 0;
    while from < shape.layout.layers {
        let left = shape.layout.layers - from;
        let part = (left * 3 / 4).max(2).min(left);
        parts.push(from..from + part);
        from += part;
    }
    let mut us = Vec::new();
    for _ in 0..9 {
        owner.ask("clear")?;
        owner.done()?;
        let began = Instant::now();
        for (index, layers) in parts.iter().enumerate() {
            let stream = index % plans.len();
            let plan = &mut plans[stream];
            plan.carry(source, there, layers.clone(), Share { checksum: true, multiprocessors })?;
            plan.fetch_checksums(layers.clone())?;
        }
        let mut sent = 0;
        while sent < parts.len() {
            ensure!(began.elapsed().as_secs() < 10, "layers do not get to the peer");
            let stream = sent % plans.len();
            let Some(moved) = plans[stream].poll_checksums()? else { continue };
            let want =
                moved.layers.start as usize * shape.chunks()..moved.layers.end as usize * shape.chunks();
            ensure!(moved.sums == sums[want], "the sender's checksums changed");
            let text: Vec<String> = moved.sums.iter().map(u64::to_string).collect();
            owner.ask(&format!("digest {} {} {}", moved.layers.start, moved.layers.end, text.join(",")))?;
            sent += 1;
        }
        for _ in &parts {
            owner.done()?;
        }
        us.push(began.elapsed().as_secs_f64() * 1e6);
    }
    Ok(us)
}

/// Takes the memory that the other process writes, and checks it when told to.
fn own(options: &Options, ordinal: usize) -> anyhow::Result<()> {
    let shape = Shape::new(options.tokens, options.order);
    let gpu = Gpu::open(ordinal)?;
    let landing = gpu.take(shape.bytes())?;
    let there = DevicePages::new(shape.layout, gpu.take(shape.layout.bytes())?)?;
    for extent in [&landing, there.storage()] {
        println!("{}", extent.region().export()?);
    }
    let pages = shape.pages(2);
    let mut plan = gpu.plan(&shape)?;
    set(&mut plan, &shape, &pages, |_| Place::Nowhere)?;
    let blank = vec![0; 64 << 20];
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["digest", start, end, sums] => {
                let layers = start.parse()?..end.parse()?;
                plan.digest(&there, layers.clone())?;
                let sums: Vec<u64> = sums.split(',').map(str::parse).collect::<Result<_, _>>()?;
                let right = plan.checksums(layers)? == sums;
                println!("{}", if right { "done" } else { "other bytes have landed" });
            }
            ["clear"] => {
                for start in (0..there.storage().len()).step_by(blank.len()) {
                    let end = (start + blank.len()).min(there.storage().len());
                    there.storage().part(start..end)?.write(&gpu.stream, &blank[..end - start])?;
                }
                println!("done");
            }
            _ => bail!("nothing is known of {line:?}"),
        }
    }
    Ok(())
}

fn report(figures: &[Figure], options: &Options) -> anyhow::Result<()> {
    println!("{:<56} {:>10} {:>10} {:>9}  bound", "", "us", "GB/s", "of bound");
    let mut rows = Vec::new();
    for figure in figures {
        let bound = figure.bound.and_then(|(name, part)| {
            Some((figures.iter().find(|other| other.name == name)?.rate(), name, part))
        });
        let held = bound.map(|(rate, ..)| figure.rate() / rate);
        println!(
            "{:<56} {:>10.1} {:>10.1} {:>9}  {}",
            figure.name,
            figure.median(),
            figure.rate(),
            held.map_or(String::new(), |held| format!("{:.1}%", held * 100.0)),
            bound.map_or(String::new(), |(_, name, part)| format!("{:.0}% of {name}", part * 100.0)),
        );
        rows.push(json!({
            "name": figure.name, "bytes": figure.bytes, "us": figure.us, "median_us": figure.median(),
            "gb_per_s": figure.rate(), "of_bound": held,
        }));
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&json!({ "tokens": options.tokens, "figures": rows }))?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
