//! Command lines as CSI manifests write them, made fit for argh.
//!
//! Go's `flag` package takes `-flag value`, `-flag=value`, `--flag value` and `--flag=value`; argh takes `--flag value`
//! only. Every manifest of the reference driver uses Go's forms, so arguments are normalised before argh sees them, and
//! each flag that was not given is filled in from its environment variable.

/// One flag of a binary.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// As written on the command line, without dashes.
    pub name: &'static str,
    /// What argh calls it; `v` is klog's name for `verbosity`.
    pub canonical: &'static str,
    /// Used when the flag is not on the command line. An empty value counts as not set.
    pub env: Option<&'static str>,
    /// `false`: a switch, which Go also lets one write `--flag=true`.
    pub takes_value: bool,
}

impl Flag {
    /// A flag with a value.
    #[must_use]
    pub const fn value(name: &'static str, env: Option<&'static str>) -> Self {
        Self { name, canonical: name, env, takes_value: true }
    }

    /// A flag without one.
    #[must_use]
    pub const fn switch(name: &'static str) -> Self {
        Self { name, canonical: name, env: None, takes_value: false }
    }

    /// The same flag under the name that argh knows.
    #[must_use]
    pub const fn called(self, canonical: &'static str) -> Self {
        Self { canonical, ..self }
    }
}

/// Arguments (without the program's name) in argh's form: `--canonical value`, switches as `--canonical`.
///
/// # Errors
/// A sentence: an unknown flag (with the known ones), a flag without its value, a switch with a value that is no boolean.
pub fn normalise(args: &[String], known: &[Flag], env: impl Fn(&str) -> Option<String>) -> Result<Vec<String>, String> {
    let mut out = Vec::new();
    let mut given: Vec<&str> = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let Some(bare) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|bare| !bare.is_empty()) else {
            // "--", "-" and positional arguments are argh's business (subcommands).
            out.push(arg.clone());
            continue;
        };
        let (name, inline) = match bare.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (bare, None),
        };
        if matches!(name, "help" | "h") {
            out.push("--help".into());
            continue;
        }
        let Some(flag) = known.iter().find(|flag| flag.name == name || flag.canonical == name) else {
            let names: Vec<String> = known.iter().map(|flag| format!("--{}", flag.name)).collect();
            return Err(format!("flag {arg:?} is not known; known are {}", names.join(" ")));
        };
        given.push(flag.canonical);
        if flag.takes_value {
            let value = match inline {
                Some(value) => value,
                None => rest.next().cloned().ok_or_else(|| format!("flag --{name} needs a value"))?,
            };
            out.extend([format!("--{}", flag.canonical), value]);
        } else if switched_on(name, inline.as_deref())? {
            out.push(format!("--{}", flag.canonical));
        }
    }
    for flag in known.iter().filter(|flag| !given.contains(&flag.canonical)) {
        if let Some(value) = flag.env.and_then(&env).filter(|value| !value.is_empty()) {
            out.extend([format!("--{}", flag.canonical), value]);
        }
    }
    Ok(out)
}

/// Go's `strconv.ParseBool`, which `--switch=…` goes through.
fn switched_on(name: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(format!("flag --{name}={other}: it is a switch and takes true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: &[Flag] = &[
        Flag::value("csi-address", Some("CSI_ENDPOINT")),
        Flag::value("node-id", Some("NODE_NAME")),
        Flag::value("v", Some("LOG_LEVEL")).called("verbosity"),
        Flag::switch("version"),
    ];

    fn normalised(args: &[&str]) -> Result<Vec<String>, String> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_string()).collect();
        normalise(&args, KNOWN, |_| None)
    }

    #[test]
    fn all_four_forms_of_go_mean_the_same() {
        for form in [&["--node-id=a"][..], &["--node-id", "a"], &["-node-id=a"], &["-node-id", "a"]] {
            assert_eq!(normalised(form).unwrap(), ["--node-id", "a"], "{form:?}");
        }
        assert_eq!(normalised(&["-v=5"]).unwrap(), ["--verbosity", "5"]);
        assert_eq!(normalised(&["-v", "5"]).unwrap(), ["--verbosity", "5"]);
        assert_eq!(normalised(&["--version"]).unwrap(), ["--version"]);
        assert_eq!(normalised(&["--version=false"]).unwrap(), [""; 0]);
    }

    #[test]
    fn a_value_may_contain_equals_signs_and_dashes() {
        assert_eq!(normalised(&["--csi-address=unix:///csi/csi.sock?a=b"]).unwrap(), ["--csi-address", "unix:///csi/csi.sock?a=b"]);
        assert_eq!(normalised(&["--node-id", "-odd"]).unwrap(), ["--node-id", "-odd"]);
    }

    #[test]
    fn the_environment_fills_in_what_is_missing_and_only_that() {
        let env = |name: &str| match name {
            "NODE_NAME" => Some("from-env".to_string()),
            "LOG_LEVEL" => Some(String::new()),
            _ => None,
        };
        assert_eq!(normalise(&[], KNOWN, env).unwrap(), ["--node-id", "from-env"]);
        assert_eq!(normalise(&["--node-id=given".into()], KNOWN, env).unwrap(), ["--node-id", "given"]);
    }

    #[test]
    fn refusals_are_sentences() {
        let unknown = normalised(&["--nodeid=a"]).unwrap_err();
        assert!(unknown.contains("--nodeid=a") && unknown.contains("--node-id"), "{unknown}");
        assert_eq!(normalised(&["--node-id"]).unwrap_err(), "flag --node-id needs a value");
        assert!(normalised(&["--version=maybe"]).unwrap_err().contains("true or false"));
    }

    proptest! {
        #[test]
        fn no_command_line_panics(args in proptest::collection::vec("[-=a-z0-9 \\PC]{0,12}", 0..6)) {
            let _ = normalise(&args, KNOWN, |_| None);
        }
    }
}
