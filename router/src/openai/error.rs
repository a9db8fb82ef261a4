//! OpenAI's error envelope.

use serde::Serialize;
use tandem_proto::wire::RequestError;

/// A refusal or failure, as the client sees it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{status}: {message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, and what would be right.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The path of the field that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense.
    pub retry_after_s: Option<u32>,
}

/// The envelope, as it is sent.
#[derive(Serialize)]
pub struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    /// The request as a whole is wrong.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError {
            status: 400,
            message: message.into(),
            kind: "invalid_request_error",
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// One field is wrong.
    #[must_use]
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::invalid(message) }
    }

    /// A field that is understood and not supported.
    #[must_use]
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("unsupported_parameter"), ..ApiError::field(param, message) }
    }

    /// No model of that name.
    #[must_use]
    pub fn unknown_model(name: &str, served: &[String]) -> ApiError {
        let message =
            format!("The model `{name}` does not exist here; this server has `{}`.", served.join("`, `"));
        ApiError {
            status: 404,
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..ApiError::invalid(message)
        }
    }

    /// Prompt and completion do not fit the model. The prompt has `prompt` tokens, or at least so many.
    #[must_use]
    pub fn context_length(param: &str, max: u32, prompt: usize, completion: Option<u32>) -> ApiError {
        let asked = match completion {
            Some(tokens) => format!(
                "you asked for {} tokens ({prompt} of the prompt, {tokens} for the completion)",
                prompt as u64 + u64::from(tokens)
            ),
            None => format!("the prompt has at least {prompt} tokens, which leaves no room for a completion"),
        };
        let message = format!("This model's maximum context length is {max} tokens, but {asked}.");
        ApiError { code: Some("context_length_exceeded"), ..ApiError::field(param, message) }
    }

    /// HTTP was not used as this server expects.
    #[must_use]
    pub fn http(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, ..ApiError::invalid(message) }
    }

    /// Too many requests at once.
    #[must_use]
    pub fn rate_limit(message: impl Into<String>) -> ApiError {
        ApiError {
            status: 429,
            kind: "rate_limit_error",
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(1),
            ..ApiError::invalid(message)
        }
    }

    /// Not now, perhaps soon.
    #[must_use]
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status: 503,
            kind: "server_error",
            code: Some(code),
            retry_after_s: Some(1),
            ..ApiError::invalid(message)
        }
    }

    /// Not done in time.
    #[must_use]
    pub fn deadline(message: impl Into<String>) -> ApiError {
        ApiError {
            status: 504,
            kind: "server_error",
            code: Some("deadline_exceeded"),
            ..ApiError::invalid(message)
        }
    }

    /// Something that should not happen did.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError {
            status: 500,
            kind: "server_error",
            code: Some("internal_error"),
            ..ApiError::invalid(message)
        }
    }

    /// The envelope.
    #[must_use]
    pub fn envelope(&self) -> Envelope<'_> {
        let body =
            Body { message: &self.message, kind: self.kind, param: self.param.as_deref(), code: self.code };
        Envelope { error: body }
    }
}

impl From<&RequestError> for ApiError {
    fn from(error: &RequestError) -> ApiError {
        match error {
            RequestError::Busy(_) => ApiError::unavailable("overloaded", error.to_string()),
            RequestError::Invalid(why) => ApiError::invalid(why),
            RequestError::Deadline(_) => ApiError::deadline(error.to_string()),
            RequestError::PeerLost(_) => ApiError::unavailable("node_lost", error.to_string()),
            RequestError::Corrupt(_) | RequestError::Internal(_) => ApiError::internal(error.to_string()),
        }
    }
}
