//! A real cluster: one router, and any number of prefill and decode processes; on loopback, or on two hosts.

use serde_json::Value;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a cluster is made up.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// Prefill processes.
    pub prefill: usize,
    /// Decode processes.
    pub decode: usize,
    /// Where router and prefill processes run. The caller's thread must reach it.
    pub prefill_on: Host,
    /// Where decode processes run.
    pub decode_on: Host,
    /// More flags for every prefill and decode process.
    pub node_flags: Vec<String>,
    /// More flags for the router.
    pub router_flags: Vec<String>,
}

/// Where processes run.
#[derive(Clone, Debug)]
pub struct Host {
    /// Where they listen.
    pub ip: IpAddr,
    /// The command, with its arguments, that runs there the one that follows it; nothing where the caller is.
    pub enter: Vec<String>,
    /// More flags for the nodes there.
    pub node_flags: Vec<String>,
}

impl Host {
    /// This one, for itself alone.
    #[must_use]
    pub fn loopback() -> Host {
        Host { ip: Ipv4Addr::LOCALHOST.into(), enter: Vec::new(), node_flags: Vec::new() }
    }
}

impl ClusterOptions {
    /// One of each on loopback, with this model.
    #[must_use]
    pub fn new(model: &Path) -> ClusterOptions {
        ClusterOptions {
            model: model.to_owned(),
            prefill: 1,
            decode: 1,
            prefill_on: Host::loopback(),
            decode_on: Host::loopback(),
            node_flags: Vec::new(),
            router_flags: Vec::new(),
        }
    }
}

/// Running processes, ended when this is dropped.
pub struct Cluster {
    processes: Vec<Process>,
    /// Where the router's HTTP endpoint is, without a path.
    pub url: String,
    /// Removed with it; none when others started it.
    tls: Option<PathBuf>,
}

/// One process, and what it has logged.
pub struct Process {
    /// Its name.
    pub name: String,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

/// The folder of the binaries: that of the running test, or its parent.
fn binaries() -> PathBuf {
    let this = std::env::current_exe().expect("a running program has a path");
    let dir = this.parent().expect("a file lies in a folder");
    if dir.ends_with("deps") {
        dir.parent().expect("deps lies in a folder").to_owned()
    } else {
        dir.to_owned()
    }
}

/// The folder of a model: `tiny` is in the project; others are looked for in `TANDEM_MODELS_DIR` and in
/// `shared/models` beside the project. None when it is not there.
#[must_use]
pub fn model(name: &str) -> Option<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project");
    let configured = std::env::var_os("TANDEM_MODELS_DIR").map(PathBuf::from);
    let beside = project.parent().map(|parent| parent.join("shared/models"));
    let places = [Some(project.join("models")), configured, beside];
    places.into_iter().flatten().map(|place| place.join(name)).find(|dir| dir.join("config.json").exists())
}

/// The path of a binary of the project.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    let how = "cargo build --release -p router -p prefill-node -p decode-node";
    assert!(path.exists(), "{} is not built: {how}", path.display());
    path
}

impl Process {
    fn start(name: &str, program: &str, on: &Host, flags: &[String]) -> Process {
        let path = binary(program);
        let words: Vec<OsString> = on.enter.iter().map(OsString::from).chain([path.clone().into()]).collect();
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().expect("it was piped")).lines();
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                kept.lock().expect("no panic while it is held").push(line);
            }
        });
        Process { name: name.into(), child, log }
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while it is held").join("\n")
    }

    /// As [`Process::log`], of what it logged as JSON.
    #[must_use]
    pub fn log_lines(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Ends it without a word.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to finish, and waits; true when it ended well in time.
    pub fn terminate(&mut self, within: Duration) -> bool {
        let pid = self.child.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).status().is_ok_and(|status| status.success());
        let until = Instant::now() + within;
        while asked && Instant::now() < until {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Cluster {
    /// Starts all processes and waits until requests are taken.
    ///
    /// # Panics
    /// When a process ends, or the cluster is not ready within a minute; with its log.
    #[must_use]
    pub fn start(options: &ClusterOptions) -> Cluster {
        let tls = std::env::temp_dir().join(format!("tandem-test-{}-{:x}", std::process::id(), unique()));
        let (model, tls_dir) = (options.model.display().to_string(), tls.display().to_string());
        let flags = |pairs: &[(&str, &str)], more: &[String]| -> Vec<String> {
            pairs
                .iter()
                .flat_map(|(flag, value)| [format!("--{flag}"), (*value).into()])
                .chain(more.iter().cloned())
                .collect()
        };
        let any_port = |host: &Host| SocketAddr::new(host.ip, 0).to_string();
        let listen = any_port(&options.prefill_on);
        let router_flags = flags(
            &[
                ("listen", &listen),
                ("control", &listen),
                ("model", &model),
                ("tls-dir", &tls_dir),
                ("log-format", "json"),
            ],
            &options.router_flags,
        );
        let mut cluster = Cluster {
            processes: vec![Process::start("router", "router", &options.prefill_on, &router_flags)],
            url: String::new(),
            tls: Some(tls),
        };
        let control = cluster.wait_for_router();
        let node = |name: &str, binary: &str, on: &Host| {
            let listen = any_port(on);
            let mut given = vec![
                ("name", name),
                ("model", &model),
                ("router", &control),
                ("control", &listen),
                ("data", &listen),
                ("status", &listen),
                ("tls-dir", &tls_dir),
                ("log-format", "json"),
            ];
            let more = [&options.node_flags[..], &on.node_flags].concat();
            if !more.iter().any(|flag| flag == "--kv-memory") {
                // Several nodes share a small machine.
                given.push(("kv-memory", "256MiB"));
            }
            Process::start(name, binary, on, &flags(&given, &more))
        };
        let (first, second) = (&options.prefill_on, &options.decode_on);
        let prefill = (0..options.prefill).map(|n| node(&format!("prefill-{n}"), "prefill-node", first));
        let decode = (0..options.decode).map(|n| node(&format!("decode-{n}"), "decode-node", second));
        let nodes: Vec<_> = prefill.chain(decode).collect();
        cluster.processes.extend(nodes);
        let (prefill, decode) = (options.prefill, options.decode);
        cluster.wait("not ready", |cluster| {
            let up = |role: &str| {
                cluster.metric(&format!("tandem_router_nodes{{role=\"{role}\",state=\"available\"}}"))
            };
            (up("prefill") == Some(prefill as f64) && up("decode") == Some(decode as f64)).then_some(())
        });
        cluster
    }

    /// One that others started, and will end, by the URL of its router. None when it takes no requests within so long.
    #[must_use]
    pub fn running(url: &str, within: Duration) -> Option<Cluster> {
        let cluster = Cluster { processes: Vec::new(), url: url.trim_end_matches('/').to_owned(), tls: None };
        let until = Instant::now() + within;
        while cluster.get("/ready").is_none_or(|(status, _)| status != 200) {
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(cluster)
    }

    /// The process of this name.
    ///
    /// # Panics
    /// When there is none.
    pub fn process(&mut self, name: &str) -> &mut Process {
        self.processes.iter_mut().find(|process| process.name == name).expect("a process of that name")
    }

    /// Sends a JSON body and returns status and body.
    #[must_use]
    pub fn post(&self, path: &str, body: &str) -> (u16, String) {
        let (status, mut reader) = self.post_stream(path, body);
        let mut text = String::new();
        let read = reader.read_to_string(&mut text);
        assert!(read.is_ok(), "reading the answer to {path}: {read:?}");
        (status, text)
    }

    /// Sends a JSON body and returns status and the body as it comes.
    #[must_use]
    pub fn post_stream(&self, path: &str, body: &str) -> (u16, Box<dyn BufRead>) {
        let answer = agent().post(format!("{}{path}", self.url)).content_type("application/json").send(body);
        let answer = answer.unwrap_or_else(|error| panic!("POST {path}: {error}"));
        let status = answer.status().as_u16();
        (status, Box::new(BufReader::new(answer.into_body().into_reader())))
    }

    /// Status and body of a page of the router's.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        get(&format!("{}{path}", self.url))
    }

    /// Status and body of a page of a node's own.
    ///
    /// # Panics
    /// When there is no node of that name, or it does not answer.
    #[must_use]
    pub fn node_page(&self, node: &str, path: &str) -> (u16, String) {
        let process =
            self.processes.iter().find(|process| process.name == node).expect("a node of that name");
        let says = |line: &Value| line["message"] == "serving status";
        let line = process.log_lines().into_iter().find(says).expect("it says where");
        get(&format!("http://{}{path}", line["http"].as_str().expect("an address"))).expect("it answers")
    }

    /// The value of a metric of the router's, by its name with labels.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (_, metrics) = self.get("/metrics")?;
        metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// The value of a metric of one node's, by the node's name.
    #[must_use]
    pub fn node_metric(&self, name: &str, node: &str) -> Option<f64> {
        let (_, metrics) = self.get("/metrics")?;
        let of_node = format!("name=\"{node}\"");
        let line =
            metrics.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains(&of_node))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Waits until `done` gives something.
    ///
    /// # Panics
    /// After a minute, or when a process ends; with all logs.
    pub fn wait<T>(&mut self, what: &str, done: impl Fn(&Cluster) -> Option<T>) -> T {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(value) = done(self) {
                return value;
            }
            let ended = self
                .processes
                .iter_mut()
                .find_map(|process| process.has_ended().then(|| process.name.clone()));
            if ended.is_some() || Instant::now() > until {
                let logs: Vec<_> =
                    self.processes.iter().map(|p| format!("--- {}\n{}", p.name, p.log())).collect();
                panic!("{what}; ended: {ended:?}\n{}", logs.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Learns from the router's log where it listens; returns its control address.
    fn wait_for_router(&mut self) -> String {
        let (http, control): (SocketAddr, String) = self.wait("the router does not listen", |cluster| {
            let log = cluster.processes[0].log();
            let field = |line: &str, name: &str| {
                let at = line.find(&format!("\"{name}\":\""))? + name.len() + 4;
                line[at..].split('"').next().map(str::to_owned)
            };
            let line = log.lines().find(|line| line.contains("\"http\":"))?;
            Some((field(line, "http")?.parse().ok()?, field(line, "control")?))
        });
        self.url = format!("http://{http}");
        control
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in &mut self.processes {
            process.kill();
            if std::thread::panicking() {
                eprintln!("--- {}\n{}", process.name, process.log());
            }
        }
        if let Some(tls) = &self.tls {
            // Left behind at worst.
            let _ = std::fs::remove_dir_all(tls);
        }
    }
}

fn get(url: &str) -> Option<(u16, String)> {
    let mut answer = agent().get(url).call().ok()?;
    Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
}

/// The first value of a metric in the text of a page, by its name and a part of its labels.
#[must_use]
pub fn metric(metrics: &str, name: &str, label: &str) -> Option<f64> {
    let of = |line: &&str| {
        line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']) && line.contains(label)
    };
    metrics.lines().find(of)?.rsplit(' ').next()?.parse().ok()
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(120)))
        .build();
    config.into()
}

fn unique() -> u128 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_nanos())
}
