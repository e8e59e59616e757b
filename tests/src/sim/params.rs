//! Parameters of a request: decoded, and checked against an endpoint's schema with Proxmox's texts (`reference/proxmox-api.md` §1, §3).

use std::collections::BTreeMap;

use serde_json::Value;

use super::access::percent_decode;
use super::answer::ApiError;
use super::drive::{self, Drive};

pub(crate) type Params = BTreeMap<String, String>;

/// The type of a parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    Integer(i64, i64),
    Boolean,
    Vmid,
    Storage,
    Choice(&'static str),
    /// `\d+[MG]?`
    AllocationSize,
    /// `\+?\d+(\.\d+)?[KMGT]?`
    ResizeSize,
    Content,
    /// A drive name but unusedN.
    DriveName,
    Drive,
    /// `[a-zA-Z][a-zA-Z0-9_-]+`
    SnapshotName,
    Text(usize),
}

/// One parameter of a schema: name, type, required.
pub(crate) type Property = (&'static str, Type, bool);

impl Type {
    fn check(self, name: &str, value: &str) -> Result<(), String> {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let pattern = |good: bool| if good { Ok(()) } else { Err("value does not match the regex pattern".to_owned()) };
        match self {
            Type::Integer(minimum, maximum) => match value.parse::<i64>() {
                Err(_) => Err(format!("type check ('integer') failed - got '{value}'")),
                Ok(number) if number < minimum => Err(format!("value must have a minimum value of {minimum}")),
                Ok(number) if number > maximum => Err(format!("value must have a maximum value of {maximum}")),
                Ok(_) => Ok(()),
            },
            Type::Boolean if !matches!(value, "0" | "1") => Err(format!("type check ('boolean') failed - got '{value}'")),
            Type::Vmid => {
                if !digits(value) {
                    return Err(format!("type check ('integer') failed - got '{value}'"));
                }
                let good = !value.starts_with('0') && (3..=9).contains(&value.len());
                if good { Ok(()) } else { Err("invalid format - value does not look like a valid VM ID\n".to_owned()) }
            }
            Type::Storage => check_storage_id(value),
            Type::Choice(values) if !values.split(", ").any(|allowed| allowed == value) => {
                Err(format!("value '{value}' does not have a value in the enumeration '{values}'"))
            }
            Type::AllocationSize => pattern(digits(value.strip_suffix(['M', 'G']).unwrap_or(value))),
            Type::ResizeSize => {
                let number = value.strip_prefix('+').unwrap_or(value);
                let number = number.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(number);
                pattern(number.split_once('.').map_or(digits(number), |(whole, fraction)| digits(whole) && digits(fraction)))
            }
            Type::Content => match value.split(',').find(|kind| !KINDS.contains(kind)) {
                Some(kind) => Err(format!("invalid format - invalid content type '{kind}'\n")),
                None => Ok(()),
            },
            Type::DriveName if !drive::is_drive(value) => {
                Err(format!("value '{value}' does not have a value in the enumeration '{}'", drive::all_names()))
            }
            // Cross rules are the handler's; everything else is the schema's.
            Type::Drive => Drive::parse(name, value).map(drop).or_else(|text| if text.starts_with("unable") { Ok(()) } else { Err(text) }),
            Type::SnapshotName => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
                let good = value.len() >= 2 && value.starts_with(|first: char| first.is_ascii_alphabetic()) && value.bytes().all(plain);
                match value.len() {
                    41.. => Err("value may only be 40 characters long".to_owned()),
                    _ if good => Ok(()),
                    _ => Err(format!("invalid format - invalid configuration ID '{value}'\n")),
                }
            }
            Type::Text(limit) if value.len() > limit => Err(format!("value may only be {limit} characters long")),
            Type::Boolean | Type::Choice(_) | Type::DriveName | Type::Text(_) => Ok(()),
        }
    }
}

const KINDS: [&str; 8] = ["images", "rootdir", "iso", "vztmpl", "backup", "snippets", "import", "none"];

fn check_storage_id(id: &str) -> Result<(), String> {
    if id.len() < 2 {
        return Err(format!("invalid format - storage ID '{id}' cannot be shorter than 2 characters\n"));
    }
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = id.bytes().all(inner)
        && id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.ends_with(|last: char| last.is_ascii_alphanumeric());
    if good { Ok(()) } else { Err(format!("invalid format - storage ID '{id}' contains illegal characters\n")) }
}

/// Checks all parameters; all errors in one map.
pub(crate) fn verify(params: &Params, type_of: impl Fn(&str) -> Option<Type>, required: &[&str]) -> Result<(), ApiError> {
    let mut errors = BTreeMap::new();
    for (name, value) in params {
        let checked = match type_of(name) {
            Some(kind) => kind.check(name, value),
            None => Err("property is not defined in schema and the schema does not allow additional properties".to_owned()),
        };
        if let Err(text) = checked {
            errors.insert(name.clone(), text);
        }
    }
    for name in required.iter().filter(|name| !params.contains_key(**name)) {
        errors.insert((*name).to_owned(), "property is missing and it is not optional".to_owned());
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::params(errors)) }
}

/// `a=1&b=2`; `;` separates too; a repeated key is joined with commas.
pub(crate) fn from_form(text: &str) -> Params {
    let mut params = Params::new();
    for pair in text.split(['&', ';']).filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let decode = |text: &str| percent_decode(&text.replace('+', " "));
        params
            .entry(decode(name))
            .and_modify(|known| {
                known.push(',');
                known.push_str(&decode(value));
            })
            .or_insert_with(|| decode(value));
    }
    params
}

/// A JSON object; scalars become text, booleans 1 and 0.
pub(crate) fn from_json(text: &str) -> Result<Params, ApiError> {
    let object: BTreeMap<String, Value> = serde_json::from_str(text).map_err(|_| broken_json(text))?;
    Ok(object.into_iter().map(|(name, value)| (name, scalar(&value))).collect())
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "1".to_owned(),
        Value::Bool(false) => "0".to_owned(),
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(","),
        Value::Null => String::new(),
        Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}

/// Perl's JSON parser's words, for an object without a quoted key; anything else broken gets the same shape.
fn broken_json(text: &str) -> ApiError {
    let rest = text.strip_prefix('{').unwrap_or(text).trim_end_matches('}');
    let at = usize::from(text.starts_with('{'));
    let message =
        format!("'\"' expected, at character offset {at} (before \"{rest}\") at /usr/share/perl5/PVE/APIServer/AnyEvent.pm line 934.\n");
    ApiError::server(500, message)
}
