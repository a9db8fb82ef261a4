//! The processes of a way, as the one that measures sees them.

use crate::PATIENCE;
use crate::measure::Machine;
use crate::pattern::Slots;
use crate::place::Place;
use crate::way::{Kind, Way};
use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long a process may take to end once it is told to.
const FAREWELL: Duration = Duration::from_secs(5);

/// A process that answers questions, one line each.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    hello: String,
}

/// What processes are started with.
pub(crate) struct Setting<'a> {
    /// Bytes of source memory, and of landing memory, of each.
    pub(crate) region: usize,
    /// Where the identity lies that all share.
    pub(crate) dir: &'a Path,
    /// Python with the peers.
    pub(crate) python: Option<&'a Path>,
    /// Of the sender, and of all others.
    pub(crate) places: [Place; 2],
}

impl Process {
    /// Starts the process of this index: 0 sends to all others.
    pub(crate) fn start(way: &Way, index: usize, setting: &mut Setting<'_>) -> anyhow::Result<Process> {
        let place = &mut setting.places[index.min(1)];
        let (name, listen) = (format!("{way}'s process {index}, {}", place.command.join(" ")), place.addr);
        if listen.port() > 0 {
            let next = listen.port().checked_add(1).context("no ports are left above")?;
            place.addr.set_port(next);
        }
        let (index, region) = (index.to_string(), setting.region.to_string());
        let mut words: Vec<OsString> = place.command.iter().map(OsString::from).collect();
        if way.is_peer() {
            let python = setting.python.with_context(|| {
                format!("{way} needs --peer PYTHON, with what benches/peers/transfer-requirements.txt lists")
            })?;
            // In the place of this program.
            words.pop();
            words.push(python.into());
            words.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/transfer.py").into_os_string());
            words.extend([way.name.as_str(), &index, &region].map(Into::into));
        } else {
            words.extend(["end", &way.name, &index, &region, &listen.to_string()].map(Into::into));
            words.push(setting.dir.into());
        }
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
        if way.is_peer() {
            command.env("TWO_HOSTS_IP", listen.ip().to_string());
        }
        if way.kind == (Kind::Nixl { tcp: true }) {
            command.env("UCX_TLS", "tcp");
        }
        let mut child = command.spawn().with_context(|| format!("{name}: {}", words[0].display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("piped")?);
        let (line, lines) = mpsc::sync_channel(16);
        std::thread::spawn(move || {
            for text in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.send(text).is_err() {
                    return;
                }
            }
        });
        let mut process = Process { name, child, stdin, lines, hello: String::new() };
        process.hello = process.answer()?;
        Ok(process)
    }

    /// Lets it run, or not: some engines keep a core busy while they do nothing, which the others are not to feel.
    pub(crate) fn let_run(&self, run: bool) -> anyhow::Result<()> {
        let signal = if run { Signal::CONT } else { Signal::STOP };
        kill_process(Pid::from_child(&self.child), signal).with_context(|| format!("{} ended", self.name))
    }

    /// What `writer` needs to write to this process.
    pub(crate) fn open(&mut self, way: &Way, writer: &Process) -> anyhow::Result<String> {
        match way.kind {
            Kind::Ours { .. } => {
                let window = self.ask(&format!("open {}", writer.hello))?;
                Ok(format!("{} {window}", self.hello))
            }
            _ => Ok(self.hello.clone()),
        }
    }

    /// Asks; [`Process::answer`] has the answer.
    pub(crate) fn tell(&mut self, question: &str) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("open until the end")?;
        writeln!(stdin, "{question}").with_context(|| format!("{} ended", self.name))
    }

    pub(crate) fn answer(&mut self) -> anyhow::Result<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Ok(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                anyhow::bail!("{} ended; its message is above", self.name)
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                anyhow::bail!("{} did not answer within {PATIENCE:?}", self.name)
            }
        }
    }

    pub(crate) fn ask(&mut self, question: &str) -> anyhow::Result<String> {
        self.tell(question)?;
        self.answer()
    }

    /// Makes these the peers that it sends to.
    pub(crate) fn connect(&mut self, peers: &[String]) -> anyhow::Result<()> {
        self.ask(&format!("connect {}", peers.join("\t"))).map(drop)
    }

    /// Where it runs.
    pub(crate) fn machine(&mut self) -> anyhow::Result<Machine> {
        Machine::parse(&self.ask("machine")?)
    }

    pub(crate) fn cpu(&mut self) -> anyhow::Result<f64> {
        Ok(self.ask("cpu")?.parse()?)
    }

    /// Checks the bytes that lie where messages land.
    pub(crate) fn verify(&mut self, slots: Slots) -> anyhow::Result<()> {
        let answer = self.ask(&format!("verify {slots}"))?;
        ensure!(answer == "right", "{}: {answer}", self.name);
        Ok(())
    }

    /// Starts sending; [`Process::sent`] waits for its end.
    pub(crate) fn send(&mut self, peers: usize, seconds: f64, slots: Slots) -> anyhow::Result<()> {
        self.tell(&format!("run {peers} {seconds} {slots}"))
    }

    /// Messages that were sent, and the seconds that they took.
    pub(crate) fn sent(&mut self) -> anyhow::Result<(u64, f64)> {
        let answer = self.answer()?;
        let (messages, seconds) = answer.split_once(' ').context("messages and seconds")?;
        Ok((messages.parse()?, seconds.parse()?))
    }

    /// Numbers that a process lists.
    pub(crate) fn list(&mut self, question: &str) -> anyhow::Result<Vec<u64>> {
        let answer = self.ask(question)?;
        Ok(answer.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stdin = None;
        // Fails when it has ended.
        let _ = self.let_run(true);
        // Its standard output ends when it does.
        while self.lines.recv_timeout(FAREWELL).is_ok() {}
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            // Ended in between, or to be ended now.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
