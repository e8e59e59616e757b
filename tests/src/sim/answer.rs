//! What a handler answers, and how it fails, before it becomes HTTP.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::version::Version;

/// The data of a successful call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) data: Value,
    /// `total` beside `data` (task list and log).
    pub(crate) total: Option<usize>,
}

impl From<Value> for Reply {
    fn from(data: Value) -> Reply {
        Reply { data, total: None }
    }
}

/// A failed call, in Proxmox's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: u16,
    /// As in the body: usually ends in a newline; its first line is the reason phrase.
    pub(crate) message: String,
    pub(crate) errors: BTreeMap<String, String>,
    pub(crate) kind: Kind,
}

/// How an error's body looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// JSON, raised by a handler.
    Handler,
    /// Plain text, from the HTTP server itself.
    Server,
    /// No body at all (401 of the auth layer, 59x of the proxy).
    Empty,
}

impl ApiError {
    /// Perl's `die "text\n"`: status 500.
    pub(crate) fn die(text: impl Into<String>) -> ApiError {
        ApiError::handler(500, format!("{}\n", text.into()))
    }

    pub(crate) fn handler(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), errors: BTreeMap::new(), kind: Kind::Handler }
    }

    pub(crate) fn server(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), errors: BTreeMap::new(), kind: Kind::Server }
    }

    pub(crate) fn empty(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), errors: BTreeMap::new(), kind: Kind::Empty }
    }

    /// 400 with one parameter's error.
    pub(crate) fn param(name: &str, text: impl Into<String>) -> ApiError {
        ApiError::params([(name.to_owned(), text.into())].into())
    }

    /// 400 with several.
    pub(crate) fn params(errors: BTreeMap<String, String>) -> ApiError {
        ApiError { status: 400, message: "Parameter verification failed.\n".to_owned(), errors, kind: Kind::Handler }
    }

    /// 403 naming what is missing where.
    pub(crate) fn forbidden(what: &str) -> ApiError {
        ApiError::handler(403, format!("Permission check failed ({what})\n"))
    }

    pub(crate) fn not_implemented(method: &str, path: &str) -> ApiError {
        ApiError::handler(501, format!("Method '{method} {path}' not implemented"))
    }

    pub(crate) fn reason(&self) -> &str {
        self.message.lines().next().unwrap_or_default()
    }

    /// The message without the newline at its end.
    pub(crate) fn text(&self) -> &str {
        self.message.strip_suffix('\n').unwrap_or(&self.message)
    }

    /// The exit status of a task that dies of it: PVE::Exception turned into a string, newlines into blanks.
    pub(crate) fn exit_status(&self) -> String {
        let mut text = if self.status == 500 { String::new() } else { format!("{} ", self.status) };
        text.push_str(&self.message);
        for (name, error) in &self.errors {
            text.push_str(&format!("{name}: {error}\n"));
        }
        text.strip_suffix('\n').unwrap_or(&text).replace('\n', " ")
    }

    pub(crate) fn body(&self, version: Version) -> Option<String> {
        match self.kind {
            Kind::Empty => None,
            Kind::Server => version.message_in_body().then(|| self.message.clone()),
            Kind::Handler => {
                let mut body = json!({"data": null});
                if let Some(body) = body.as_object_mut() {
                    if version.message_in_body() {
                        body.insert("message".to_owned(), self.message.clone().into());
                    }
                    if !self.errors.is_empty() {
                        body.insert("errors".to_owned(), json!(self.errors));
                    }
                }
                Some(body.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_flattens_a_param_exception_as_recorded() {
        let error = ApiError::param("scsi1", "hotplug problem - error on hot-unplugging device 'virtioscsi1' - still busy in guest?\n");
        assert_eq!(
            error.exit_status(),
            "400 Parameter verification failed. scsi1: hotplug problem - error on hot-unplugging device 'virtioscsi1' - still busy in guest? "
        );
        assert_eq!(ApiError::die("VM is locked (backup)").exit_status(), "VM is locked (backup)");
        assert_eq!(
            ApiError::forbidden("/storage/ds1, Datastore.AllocateSpace").exit_status(),
            "403 Permission check failed (/storage/ds1, Datastore.AllocateSpace)"
        );
    }
}
