//! Reads fields of JSON objects, and says by its path which one is wrong.

use super::ApiError;
use serde_json::{Map, Value};
use std::fmt::Display;
use std::ops::RangeInclusive;

/// An object of the request, with the path that leads to it.
#[derive(Clone)]
pub(crate) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The request's body.
    pub(crate) fn body(value: &'a Value) -> Result<Fields<'a>, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { path: String::new(), map }),
            other => Err(ApiError::invalid(format!("The body must be a JSON object, not {}.", kind(other)))),
        }
    }

    /// The object at `path`.
    pub(crate) fn at(path: String, value: &'a Value) -> Result<Fields<'a>, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { path, map }),
            other => Err(wrong(&path, other, "an object")),
        }
    }

    /// A field's value; null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(key).map(|value| Fields::at(self.path(key), value)).transpose()
    }

    pub(crate) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong(&self.path(key), other, "a boolean")),
        }
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(key), other, "a string")),
        }
    }

    pub(crate) fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong(&self.path(key), value, "a number"))?;
        within(&self.path(key), number, &range)?;
        Ok(Some(number as f32))
    }

    pub(crate) fn integer(&self, key: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        integer(&self.path(key), value, range).map(Some)
    }

    pub(crate) fn array(&self, key: &str, max: usize) -> Result<Option<&'a [Value]>, ApiError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(items)) if items.len() <= max => Ok(Some(items)),
            Some(Value::Array(items)) => Err(ApiError::field(
                self.path(key),
                format!("'{}' has {} entries; {max} are allowed.", self.path(key), items.len()),
            )),
            Some(other) => Err(wrong(&self.path(key), other, "an array")),
        }
    }
}

/// A whole number within `range`.
pub(crate) fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    // A float without a fraction is what some clients send for a whole number.
    let whole = value.as_i64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as i64));
    match whole {
        Some(number) => {
            within(path, number, &range)?;
            Ok(number)
        }
        None if value.is_number() => {
            Err(ApiError::field(path, format!("'{path}' is {value}; it must be a whole number.")))
        }
        None => Err(wrong(path, value, "an integer")),
    }
}

fn within<T: PartialOrd + Display>(path: &str, value: T, range: &RangeInclusive<T>) -> Result<(), ApiError> {
    if range.contains(&value) {
        return Ok(());
    }
    let message = format!("'{path}' is {value}; it must be from {} to {}.", range.start(), range.end());
    Err(ApiError::field(path, message))
}

/// A field of the wrong type.
pub(crate) fn wrong(path: &str, value: &Value, expected: &str) -> ApiError {
    ApiError::field(path, format!("'{path}' is {}; it must be {expected}.", kind(value)))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
