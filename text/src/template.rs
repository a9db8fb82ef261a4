//! Messages to prompt text, as Hugging Face's `apply_chat_template` renders them.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::collections::BTreeMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Instructions of one rendering: some seconds' worth, far beyond any real conversation.
const FUEL: u64 = 20_000_000;
/// The longest rendered prompt. Longer ones cannot fit the longest prompt in tokens.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// The longest template.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// The widest indent that `tojson` makes: output stays proportional to input.
const MAX_INDENT: usize = 16;

/// A model's chat template. Rendering needs no lock.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_template: bool,
    bos: Option<String>,
    eos: Option<String>,
}

/// What a template renders.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// The conversation, as the request gives it.
    pub messages: Vec<serde_json::Value>,
    /// Tools on offer.
    pub tools: Option<serde_json::Value>,
    /// Documents to ground answers in.
    pub documents: Option<serde_json::Value>,
    /// End with the start of the assistant's turn.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables, which some templates know.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
}

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself cannot be used.
    #[error("chat template {name}: {cause}")]
    Template {
        /// Which of the model's templates.
        name: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The template refuses these messages, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The template does not cope with these messages.
    #[error("the chat template cannot render these messages: {0}")]
    Render(String),
    /// The messages are too many or too long.
    #[error("the conversation is too long to render")]
    Long,
}

impl ChatTemplate {
    /// Compiles the named templates; `default` renders, `tool_use` does when there are tools. A single
    /// template of any name is the default.
    ///
    /// # Errors
    /// When one is no template.
    pub fn new(
        sources: Vec<(String, String)>,
        bos: Option<String>,
        eos: Option<String>,
    ) -> Result<ChatTemplate, TemplateError> {
        let mut environment = environment();
        let only = sources.len() == 1;
        let mut names = Vec::new();
        for (name, source) in sources {
            let name = if only { "default".to_owned() } else { name };
            let failed = |cause: String| TemplateError::Template { name: name.clone(), cause };
            if source.len() > MAX_TEMPLATE_BYTES {
                return Err(failed(format!("{} bytes is more than {MAX_TEMPLATE_BYTES}", source.len())));
            }
            environment.add_template_owned(name.clone(), source).map_err(|e| failed(describe(&e)))?;
            names.push(name);
        }
        if !names.iter().any(|name| name == "default") {
            let cause = format!("there are only {}", names.join(", "));
            return Err(TemplateError::Template { name: "default".into(), cause });
        }
        let has_tool_template = names.iter().any(|name| name == "tool_use");
        Ok(ChatTemplate { environment, has_tool_template, bos, eos })
    }

    /// Whether any of the templates holds `word`: a role or a variable that it may know or not.
    #[must_use]
    pub fn mentions(&self, word: &str) -> bool {
        self.environment.templates().any(|(_, template)| template.source().contains(word))
    }

    /// The prompt's text.
    ///
    /// # Errors
    /// When the template refuses the messages, or cannot cope with them.
    pub fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<String, Value> =
            input.kwargs.iter().map(|(name, value)| (name.clone(), Value::from_serialize(value))).collect();
        let final_text = input.messages.last().and_then(|message| message["content"].as_str());
        let mut set = |name: &str, value: Value| variables.insert(name.to_owned(), value);
        set("messages", Value::from_serialize(&input.messages));
        set("add_generation_prompt", Value::from(input.add_generation_prompt));
        set("tools", Value::from_serialize(&input.tools));
        set("documents", Value::from_serialize(&input.documents));
        if let Some(bos) = &self.bos {
            set("bos_token", Value::from(bos));
        }
        if let Some(eos) = &self.eos {
            set("eos_token", Value::from(eos));
        }
        let name = if input.tools.is_some() && self.has_tool_template { "tool_use" } else { "default" };
        let template =
            self.environment.get_template(name).map_err(|e| TemplateError::Render(describe(&e)))?;
        let mut output = Capped { bytes: Vec::new(), full: false };
        match template.render_captured_to(variables, &mut output) {
            Ok(_) => {}
            Err(_) if output.full => return Err(TemplateError::Long),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => return Err(TemplateError::Long),
            Err(error) => return Err(refusal(&error)),
        }
        let mut text = String::from_utf8(output.bytes).map_err(|e| TemplateError::Render(e.to_string()))?;
        if input.continue_final_message {
            let last = final_text.map(str::trim).filter(|last| !last.is_empty());
            match last.and_then(|last| text.rfind(last).map(|at| at + last.len())) {
                Some(end) => text.truncate(end),
                None => {
                    return Err(TemplateError::Refused("there is no final message to continue".into()));
                }
            }
        }
        Ok(text)
    }
}

/// A message thrown by `raise_exception`, marked so that it is told apart from a template's own failures.
const RAISED: &str = "raised by the template: ";

fn refusal(error: &Error) -> TemplateError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(inner) = cause {
        let raised = inner.downcast_ref::<Error>().and_then(Error::detail);
        if let Some(message) = raised.and_then(|detail| detail.strip_prefix(RAISED)) {
            return TemplateError::Refused(message.to_owned());
        }
        cause = inner.source();
    }
    TemplateError::Render(describe(error))
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!(
            "{} (line {line})",
            error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
        ),
        None => error.to_string(),
    }
}

/// The environment that transformers gives to templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Map | ValueKind::Seq => {
            out.write_str(&python_str(value)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        strftime(&format, now)
    });
    environment
}

/// What Python's `str` would print.
fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::None => "None".into(),
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            format!("[{}]", items.map(|item| python_repr(&item)).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Map => {
            let keys = value.try_iter().into_iter().flatten();
            let entry = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key), python_repr(&item))
            };
            format!("{{{}}}", keys.map(entry).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

fn python_repr(value: &Value) -> String {
    let Some(text) = value.as_str() else {
        return python_str(value);
    };
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, …)`, without HTML escapes.
fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let refused = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none() && !indent.is_undefined()) {
        None => None,
        Some(indent) => {
            let width = usize::try_from(indent).map_err(|_| refused("indent must be a number"))?;
            Some(" ".repeat(width.min(MAX_INDENT)))
        }
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        [item, key] = separators.try_into().map_err(|_| refused("separators must be a pair"))?;
    }
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let _ = kwargs.get::<Option<bool>>("ensure_ascii")?;
    kwargs.assert_all_used()?;

    let mut json = serde_json::to_value(value).map_err(|e| refused(&e.to_string()))?;
    if sort_keys {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    let formatter = PythonJson { indent, item, key, depth: 0, empty: false };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        .map_err(|e| refused(&e.to_string()))?;
    String::from_utf8(out).map(Value::from).map_err(|e| refused(&e.to_string()))
}

/// The layout of `json.dumps`.
struct PythonJson {
    indent: Option<String>,
    item: String,
    key: String,
    depth: usize,
    empty: bool,
}

impl PythonJson {
    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn entry<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.empty = false;
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for PythonJson {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.entry(writer, first)
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.entry(writer, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

/// Python's `strftime` for UTC, with the directives that templates use; others stay as they are.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let new_year = (1..month).map(|m| days_of_month(year, m)).sum::<u64>();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        let number = |value: u64, width: usize| {
            if unpadded { value.to_string() } else { format!("{value:0width$}") }
        };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(new_year + day, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            Some(other) => format!("%{other}"),
            None => "%".into(),
        });
    }
    out
}

/// Year, month and day of the month, of a day counted from 1970.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    while days >= year_days(year) {
        days -= year_days(year);
        year += 1;
    }
    let mut month = 1;
    while days >= days_of_month(year, month) {
        days -= days_of_month(year, month);
        month += 1;
    }
    (year, month, days + 1)
}

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    365 + u64::from(leap(year))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Refuses what goes beyond [`MAX_OUTPUT_BYTES`].
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::Error::other("the rendered prompt is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let moment = 1_709_211_909;
        let check = |format: &str, expected: &str| assert_eq!(strftime(format, moment), expected, "{format}");
        check("%d %b %Y", "29 Feb 2024");
        check("%A, %B %-d, %Y", "Thursday, February 29, 2024");
        check("%Y-%m-%d %H:%M:%S", "2024-02-29 13:05:09");
        check("%I %p %j %%", "01 PM 060 %");
        assert_eq!(strftime("%F", 0), "1970-01-01");
        assert_eq!(strftime("%F %a", 4_102_444_800), "2100-01-01 Fri");
    }
}
