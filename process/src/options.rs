//! Options from flags, environment and file, in this order of precedence, with one struct for all three.
//!
//! What the file or the environment sets becomes the default of the flag of the same name, after the flag's
//! own parser has accepted it. So nothing is declared twice, and an unknown key is an error as an unknown
//! flag is.

use crate::{LogFormat, logs};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command, Parser};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The largest configuration file that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The flags that every binary has; flatten it into the binary's own struct.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Process")]
pub struct ProcessOptions {
    /// TOML file with options. Its keys are the flags' long names, as in `drain-timeout = "30s"`.
    ///
    /// Flags win over environment variables, these over the file, the file over defaults. Unknown keys are
    /// errors.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How log lines look: `text` for people, `json` for collectors.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged: a level (error, warn, info, debug, trace) or directives such as `info,router=debug`.
    ///
    /// `RUST_LOG` is read when neither the flag nor its own variable is given. The default logs what an
    /// operator acts on and nothing for each request.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
    /// After SIGTERM or SIGINT: how long running requests may take to finish before they are cut off.
    ///
    /// The default is what Kubernetes grants between SIGTERM and SIGKILL, less a margin to say goodbye.
    #[arg(long, value_name = "DURATION", default_value = "25s", value_parser = crate::units::duration)]
    pub drain_timeout: Duration,
}

impl ProcessOptions {
    /// Starts logging; call it once, first of all.
    ///
    /// # Errors
    /// When `--log-level` is not a filter.
    pub fn start_logs(&self) -> Result<(), logs::LogError> {
        logs::start(self.log_format, &self.log_level)
    }
}

/// Why options could not be put together. Its text names the place, the key and the value.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// A flag is wrong, or help or version was asked for.
    #[error(transparent)]
    Flags(#[from] clap::Error),
    /// The file cannot be read.
    #[error("config file {}: {cause}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What went wrong.
        cause: String,
    },
    /// The file holds a key that is no option.
    #[error("config file {}: unknown key `{key}`{hint}", file.display())]
    UnknownKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// The option that was probably meant, as a phrase.
        hint: String,
    },
    /// A value is refused.
    #[error("{place}: {key} is `{value}`: {reason}")]
    Value {
        /// The file or the environment.
        place: String,
        /// The key or the variable.
        key: String,
        /// The value.
        value: String,
        /// Why not.
        reason: String,
    },
}

/// The options of this process. Ends it with a message and status 2 when they are wrong, and with the text
/// asked for and status 0 on `--help` and `--version`.
///
/// `prefix` starts the environment variables: with `TANDEM_ROUTER`, `--max-queue` is `TANDEM_ROUTER_MAX_QUEUE`.
#[must_use]
pub fn parse<T: Parser>(prefix: &str) -> T {
    match parse_from(prefix, std::env::args_os().collect(), |name| std::env::var(name).ok()) {
        Ok(options) => options,
        Err(OptionsError::Flags(error)) => error.exit(),
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(2);
        }
    }
}

/// [`parse`] with the process's surroundings as arguments.
///
/// # Errors
/// For everything that [`parse`] ends the process for.
pub fn parse_from<T: Parser>(
    prefix: &str,
    args: Vec<OsString>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<T, OptionsError> {
    let mut command = T::command();
    let optional = T::command().mut_args(|arg| arg.required(false));

    // Without requirements this fails only for what is wrong on the command line itself.
    let given = match optional.clone().try_get_matches_from(&args) {
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            return Err(help(prefix, &args, command, error));
        }
        other => other?,
    };

    let mut layers = Vec::new();
    let config_variable = variable(prefix, "config");
    let file = match given.try_get_one::<PathBuf>("config") {
        Ok(Some(file)) => Some(file.clone()),
        Ok(None) => env(&config_variable).map(PathBuf::from),
        Err(_) => None,
    };
    if let Some(file) = &file {
        layers.extend(from_file(file, &optional)?);
    }
    for arg in optional.get_arguments() {
        let Some(key) = arg.get_long() else { continue };
        let own = variable(prefix, key);
        let value = match env(&own) {
            None if key == "log-level" => env("RUST_LOG").map(|value| ("RUST_LOG".to_owned(), value)),
            found => found.map(|value| (own, value)),
        };
        if let Some((name, value)) = value {
            let values = match arg.get_value_delimiter() {
                Some(delimiter) => value.split(delimiter).map(str::to_owned).collect(),
                None => vec![value],
            };
            layers.push(Layer { place: "environment".into(), shown: name, key: key.into(), values });
        }
    }

    for layer in layers {
        let arg = find(&optional, &layer.key).expect("layers hold known keys");
        check(&optional, arg, &layer)?;
        let id = arg.get_id().clone();
        command = command.mut_arg(id, |arg| arg.required(false).default_values(layer.values));
    }
    let mut matches = command.try_get_matches_from(args)?;
    Ok(T::from_arg_matches_mut(&mut matches)?)
}

/// Values for one option from one place.
struct Layer {
    place: String,
    /// The key as it is called in that place.
    shown: String,
    key: String,
    values: Vec<String>,
}

fn variable(prefix: &str, key: &str) -> String {
    format!("{prefix}_{}", key.replace('-', "_").to_uppercase())
}

fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(key))
}

/// Help that also names the environment variables.
fn help(prefix: &str, args: &[OsString], command: Command, plain: clap::Error) -> OptionsError {
    let named = command.mut_args(|arg| match arg.get_long() {
        Some(key) => {
            let name = variable(prefix, key);
            arg.env(name).hide_env_values(true)
        }
        None => arg,
    });
    match named.try_get_matches_from(args) {
        Err(error) if error.kind() == ErrorKind::DisplayHelp => error.into(),
        _ => plain.into(),
    }
}

fn from_file(file: &Path, command: &Command) -> Result<Vec<Layer>, OptionsError> {
    let failed = |cause: String| OptionsError::File { file: file.to_owned(), cause };
    let len = std::fs::metadata(file).map_err(|e| failed(e.to_string()))?.len();
    if len > MAX_CONFIG_BYTES {
        return Err(failed(format!("{len} bytes is more than the {MAX_CONFIG_BYTES} that are read")));
    }
    let text = std::fs::read_to_string(file).map_err(|e| failed(e.to_string()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| failed(e.to_string()))?;
    let mut layers = Vec::new();
    for (key, value) in table {
        if key == "config" || find(command, &key).is_none() {
            return Err(OptionsError::UnknownKey {
                file: file.to_owned(),
                hint: hint(command, &key, &value),
                key,
            });
        }
        let refused = |value: &toml::Value| OptionsError::Value {
            place: format!("config file {}", file.display()),
            key: key.clone(),
            value: format!("{value:?}"),
            reason: format!("a {} cannot be an option's value", value.type_str()),
        };
        let values = match &value {
            toml::Value::Array(items) => items
                .iter()
                .map(|item| scalar(item).ok_or_else(|| refused(item)))
                .collect::<Result<_, _>>()?,
            single => vec![scalar(single).ok_or_else(|| refused(single))?],
        };
        let place = format!("config file {}", file.display());
        layers.push(Layer { place, shown: key.clone(), key, values });
    }
    Ok(layers)
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}

/// The option that was meant, found where only its spelling differs.
fn hint(command: &Command, key: &str, value: &toml::Value) -> String {
    let plain = |name: &str| name.replace(['-', '_'], "").to_lowercase();
    let close = command.get_arguments().filter_map(Arg::get_long).find(|long| plain(long) == plain(key));
    match close {
        _ if key == "config" => "; a file cannot name another one".into(),
        Some(long) => format!("; it is spelled `{long}`"),
        None if value.is_table() => "; options stand at the top level, without tables".into(),
        None => "; --help lists the options".into(),
    }
}

/// Lets the flag's own parser judge the values, so that the error can say where they came from.
fn check(command: &Command, arg: &Arg, layer: &Layer) -> Result<(), OptionsError> {
    let refused = |value: &str, reason: String| OptionsError::Value {
        place: layer.place.clone(),
        key: layer.shown.clone(),
        value: value.to_owned(),
        reason,
    };
    let many = matches!(arg.get_action(), ArgAction::Append);
    if layer.values.len() != 1 && !many {
        return Err(refused(&layer.values.join(", "), "one value is allowed".into()));
    }
    for value in &layer.values {
        if matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse) {
            if !matches!(value.as_str(), "true" | "false") {
                return Err(refused(value, "must be true or false".into()));
            }
            continue;
        }
        let args = ["check".to_owned(), format!("--{}={value}", layer.key)];
        if let Err(error) = command.clone().try_get_matches_from(args) {
            let text = error.to_string();
            let text =
                text.trim_start_matches("error: ").split("\n\nFor more").next().unwrap_or_default().trim();
            return Err(refused(value, text.replace("\n\n", "; ").replace('\n', " ")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser, Debug)]
    #[command(name = "sample", version)]
    struct Sample {
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:1")]
        listen: std::net::SocketAddr,
        /// No default.
        #[arg(long)]
        model: PathBuf,
        /// Several.
        #[arg(long, value_delimiter = ',')]
        names: Vec<String>,
        /// A switch.
        #[arg(long)]
        eager: bool,
        #[command(flatten)]
        process: ProcessOptions,
    }

    fn parsed(flags: &[&str], env: &[(&str, &str)], file: Option<&str>) -> Result<Sample, String> {
        let mut args: Vec<OsString> = vec!["sample".into()];
        args.extend(flags.iter().map(OsString::from));
        let path = file.map(|text| {
            static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path =
                std::env::temp_dir().join(format!("tandem-options-{}-{number}.toml", std::process::id()));
            std::fs::write(&path, text).unwrap();
            args.push("--config".into());
            args.push(path.clone().into());
            path
        });
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let sample = parse_from::<Sample>("TANDEM_SAMPLE", args, env).map_err(|e| e.to_string());
        if let Some(path) = path {
            std::fs::remove_file(path).unwrap();
        }
        sample
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let file = Some("listen = '127.0.0.1:2'\nmodel = 'file'\nnames = ['a', 'b']\neager = true");
        let env = [("TANDEM_SAMPLE_LISTEN", "127.0.0.1:3"), ("TANDEM_SAMPLE_MODEL", "env")];
        let flags = ["--listen", "127.0.0.1:4"];

        let all = parsed(&flags, &env, file).unwrap();
        assert_eq!((all.listen.port(), all.model.to_str().unwrap()), (4, "env"));
        assert_eq!((all.names, all.eager), (vec!["a".to_owned(), "b".to_owned()], true));
        assert_eq!(parsed(&[], &env, file).unwrap().listen.port(), 3);
        assert_eq!(parsed(&[], &[], file).unwrap().listen.port(), 2);
        assert_eq!(parsed(&["--model", "x"], &[], None).unwrap().listen.port(), 1);
        let env = [("TANDEM_SAMPLE_NAMES", "x,y"), ("TANDEM_SAMPLE_MODEL", "env")];
        assert_eq!(parsed(&[], &env, None).unwrap().names, ["x", "y"]);
    }

    #[test]
    fn rust_log_is_heard_and_overruled() {
        let level = |flags: &[&str], env: &[(&str, &str)]| {
            let flags: Vec<&str> = ["--model", "x"].iter().chain(flags).copied().collect();
            parsed(&flags, env, Some("log-level = 'error'")).unwrap().process.log_level
        };
        assert_eq!(level(&[], &[]), "error");
        assert_eq!(level(&[], &[("RUST_LOG", "debug")]), "debug");
        assert_eq!(level(&[], &[("RUST_LOG", "debug"), ("TANDEM_SAMPLE_LOG_LEVEL", "warn")]), "warn");
        assert_eq!(level(&["--log-level", "trace"], &[("RUST_LOG", "debug")]), "trace");
    }

    #[test]
    fn errors_name_the_place_the_key_and_the_value() {
        let check = |flags: &[&str], env: &[(&str, &str)], file: &str, parts: &[&str]| {
            let text = parsed(flags, env, Some(file)).unwrap_err();
            for part in parts {
                assert!(text.contains(part), "{part:?} is not in {text:?}");
            }
        };
        let model = ["--model", "x"];
        check(&model, &[], "listen = 'nowhere'", &["tandem-options", "listen", "`nowhere`", "invalid"]);
        check(
            &model,
            &[],
            "drain_timeout = '3s'",
            &["unknown key `drain_timeout`", "spelled `drain-timeout`"],
        );
        check(&model, &[], "port = 3", &["unknown key `port`"]);
        check(&model, &[], "[limits]\nlisten = 3", &["unknown key `limits`", "without tables"]);
        check(&model, &[], "eager = 3", &["eager", "`3`", "true or false"]);
        check(&model, &[], "listen = ['a', 'b']", &["listen", "one value"]);
        check(&model, &[], "listen = ", &["tandem-options"]);
        check(&model, &[("TANDEM_SAMPLE_LISTEN", "x")], "", &["environment: TANDEM_SAMPLE_LISTEN is `x`"]);
        check(&[], &[], "", &["--model"]);
        check(&["--modl", "x"], &[], "", &["--modl"]);
        assert!(
            parsed(&["--model", "x", "--config", "/no/such/file"], &[], None)
                .unwrap_err()
                .contains("/no/such/file")
        );
    }

    #[test]
    fn help_names_the_variables() {
        let text = parsed(&["--help"], &[], None).unwrap_err();
        assert!(text.contains("[env: TANDEM_SAMPLE_LISTEN]"), "{text}");
        assert!(text.contains("[default: 127.0.0.1:1]"), "{text}");
    }
}
