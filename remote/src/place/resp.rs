//! The protocol of Redis: what is asked, and how answers begin. Version 2, as much of it as chunks need.

/// The longest line of an answer.
pub(super) const LONGEST_LINE: usize = 1 << 10;

/// An answer's first line.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Reply {
    /// Done.
    Done,
    /// Not done, and why.
    Error(String),
    /// A number.
    Number(i64),
    /// So many bytes follow, and then two that end them.
    Bytes(u64),
    /// There is nothing.
    Nothing,
}

/// The answer that begins here and how long its line is; none yet if the line has not ended.
pub(super) fn reply(bytes: &[u8]) -> Result<Option<(Reply, usize)>, String> {
    let Some(end) = bytes.windows(2).take(LONGEST_LINE).position(|pair| pair == b"\r\n") else {
        return if bytes.len() > LONGEST_LINE { Err("its answer is no line".into()) } else { Ok(None) };
    };
    let line = String::from_utf8_lossy(&bytes[..end]);
    let (kind, rest) = line.split_at_checked(1).unwrap_or(("", ""));
    let number = || rest.parse::<i64>().map_err(|_| format!("its answer is no number: {rest:.40}"));
    let reply = match kind {
        "+" => Reply::Done,
        "-" => Reply::Error(rest.to_owned()),
        ":" => Reply::Number(number()?),
        "$" => match u64::try_from(number()?) {
            Ok(len) => Reply::Bytes(len),
            Err(_) => Reply::Nothing,
        },
        _ => return Err(format!("it does not answer as Redis does: {line:.40}")),
    };
    Ok(Some((reply, end + 2)))
}

/// Appends a command to what is to be sent.
pub(super) fn command(out: &mut Vec<u8>, words: &[&str]) {
    begin(out, words.len());
    for word in words {
        self::word(out, word);
    }
}

/// Appends a word of a command.
pub(super) fn word(out: &mut Vec<u8>, word: &str) {
    length(out, word.len());
    out.extend(word.as_bytes());
    out.extend(b"\r\n");
}

/// Appends the beginning of a command of so many words.
pub(super) fn begin(out: &mut Vec<u8>, words: usize) {
    out.extend(format!("*{words}\r\n").as_bytes());
}

/// Appends the beginning of a word, whose bytes and two that end it are to follow.
pub(super) fn length(out: &mut Vec<u8>, bytes: usize) {
    out.extend(format!("${bytes}\r\n").as_bytes());
}

/// Whether a command that was answered so may go well a little later.
pub(super) fn passing(error: &str) -> bool {
    let kind = error.split(' ').next().unwrap_or_default();
    matches!(kind, "LOADING" | "BUSY" | "TRYAGAIN" | "CLUSTERDOWN" | "MASTERDOWN")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_from_their_first_line() {
        let check = |bytes: &str, expected| assert_eq!(reply(bytes.as_bytes()), expected, "{bytes}");
        check("+OK\r\nmore", Ok(Some((Reply::Done, 5))));
        check(":12\r\n", Ok(Some((Reply::Number(12), 5))));
        check("$5\r\nhello\r\n", Ok(Some((Reply::Bytes(5), 4))));
        check("$-1\r\n", Ok(Some((Reply::Nothing, 5))));
        check("-OOM command not allowed\r\n", Ok(Some((Reply::Error("OOM command not allowed".into()), 26))));
        for part in ["", "$", "$5", "$5\r", "+O"] {
            check(part, Ok(None));
        }
        for wrong in ["\r\n", "$x\r\n", "$99999999999999999999\r\n", "HTTP/1.1 400 Bad Request\r\n", "*1\r\n"]
        {
            assert!(reply(wrong.as_bytes()).is_err(), "{wrong}");
        }
        assert_eq!(reply(&[b'+'; LONGEST_LINE]), Ok(None));
        assert!(reply(&[b'+'; LONGEST_LINE + 1]).is_err());
    }

    #[test]
    fn commands_are_written_with_their_lengths() {
        let mut out = Vec::new();
        command(&mut out, &["GET", "a b"]);
        assert_eq!(out, b"*2\r\n$3\r\nGET\r\n$3\r\na b\r\n");
    }
}
