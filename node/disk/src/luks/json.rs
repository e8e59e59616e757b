//! The JSON of a LUKS2 metadata area: a bounded reader and a printer that keeps order and spelling.
//!
//! Own, because a header of somebody else's is changed in one place and must keep everything else: the order of keys, numbers as they were spelled, members
//! that we do not know. `serde_json` reorders or needs an index crate for that. Read from a disk that anyone may have written: every size has a limit.

use std::fmt::Write as _;

/// How deep objects and lists may nest. LUKS2 needs 5.
const MAX_DEPTH: usize = 16;
/// How many values one area may hold. 32 keyslots with their digests and tokens are under 1,500.
const MAX_VALUES: usize = 8192;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As it was spelled.
    Number(String),
    Text(String),
    List(Vec<Self>),
    /// In the order of the text; keys are unique.
    Object(Vec<(String, Self)>),
}

impl Value {
    /// Reads one value and nothing after it but white space. The error says what is wrong and at which byte.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut reader = Reader { text, at: 0, values: 0 };
        let value = reader.value(0)?;
        reader.space();
        if reader.at == text.len() { Ok(value) } else { Err(reader.error("text after the end of the object")) }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        self.members().iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    pub(super) fn get_mut(&mut self, key: &str) -> Option<&mut Self> {
        match self {
            Self::Object(members) => members.iter_mut().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// Members of an object; nothing for any other value.
    pub(super) fn members(&self) -> &[(String, Self)] {
        match self {
            Self::Object(members) => members,
            _ => &[],
        }
    }

    pub(super) fn list(&self) -> &[Self] {
        match self {
            Self::List(items) => items,
            _ => &[],
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A number that is a number (LUKS2's "integer").
    pub(super) fn u32(&self) -> Option<u32> {
        match self {
            Self::Number(text) => text.parse().ok(),
            _ => None,
        }
    }

    /// A number that is spelled as a text of decimal digits (LUKS2's "string-uint64").
    pub(super) fn u64(&self) -> Option<u64> {
        self.text().filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
    }

    /// Compact, as json-c prints it with no spaces and `/` as it is.
    pub(super) fn print(&self) -> String {
        let mut out = String::new();
        self.print_to(&mut out);
        out
    }

    fn print_to(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Self::Number(spelling) => out.push_str(spelling),
            Self::Text(text) => print_text(text, out),
            Self::List(items) => {
                out.push('[');
                for (n, item) in items.iter().enumerate() {
                    if n > 0 {
                        out.push(',');
                    }
                    item.print_to(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                for (n, (key, value)) in members.iter().enumerate() {
                    if n > 0 {
                        out.push(',');
                    }
                    print_text(key, out);
                    out.push(':');
                    value.print_to(out);
                }
                out.push('}');
            }
        }
    }
}

fn print_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c < ' ' => {
                // Writing to a String does not fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    values: usize,
}

impl Reader<'_> {
    fn error(&self, what: &str) -> String {
        format!("JSON at byte {}: {what}", self.at)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let is_next = self.peek() == Some(byte);
        self.at += usize::from(is_next);
        is_next
    }

    fn word(&mut self, word: &str, value: Value) -> Result<Value, String> {
        if self.text.get(self.at..).is_some_and(|rest| rest.starts_with(word)) {
            self.at += word.len();
            Ok(value)
        } else {
            Err(self.error("not a value"))
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        self.values += 1;
        if depth > MAX_DEPTH || self.values > MAX_VALUES {
            return Err(self.error(&format!("deeper than {MAX_DEPTH} levels, or more than {MAX_VALUES} values")));
        }
        self.space();
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.items(depth),
            Some(b'"') => Ok(Value::Text(self.string()?)),
            Some(b't') => self.word("true", Value::Bool(true)),
            Some(b'f') => self.word("false", Value::Bool(false)),
            Some(b'n') => self.word("null", Value::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err(self.error("not a value")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut members: Vec<(String, Value)> = Vec::new();
        self.space();
        if self.take(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err(self.error("a key is missing"));
            }
            let key = self.string()?;
            // Readers differ on which of two counts; we take neither.
            if members.iter().any(|(name, _)| *name == key) {
                return Err(self.error("a key stands twice"));
            }
            self.space();
            if !self.take(b':') {
                return Err(self.error("':' is missing"));
            }
            let value = self.value(depth + 1)?;
            members.push((key, value));
            self.space();
            if self.take(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.take(b',') {
                return Err(self.error("',' or '}' is missing"));
            }
        }
    }

    fn items(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.take(b']') {
            return Ok(Value::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            if self.take(b']') {
                return Ok(Value::List(items));
            }
            if !self.take(b',') {
                return Err(self.error("',' or ']' is missing"));
            }
        }
    }

    fn digits(&mut self) -> usize {
        let from = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - from
    }

    fn number(&mut self) -> Result<Value, String> {
        let from = self.at;
        self.take(b'-');
        let leading_zero = self.peek() == Some(b'0');
        let whole = self.digits();
        let mut is_good = whole == 1 || (whole > 1 && !leading_zero);
        if self.take(b'.') {
            is_good &= self.digits() > 0;
        }
        if self.take(b'e') || self.take(b'E') {
            if !self.take(b'+') {
                self.take(b'-');
            }
            is_good &= self.digits() > 0;
        }
        match self.text.get(from..self.at) {
            Some(spelling) if is_good => Ok(Value::Number(spelling.to_owned())),
            _ => Err(self.error("not a number")),
        }
    }

    fn string(&mut self) -> Result<String, String> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let Some(c) = self.text.get(self.at..).and_then(|rest| rest.chars().next()) else {
                return Err(self.error("a text without an end"));
            };
            self.at += c.len_utf8();
            match c {
                '"' => return Ok(out),
                '\\' => out.push(self.escape()?),
                c if c < ' ' => return Err(self.error("a control character in a text")),
                c => out.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char, String> {
        let byte = self.peek();
        self.at += 1;
        Ok(match byte {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let high = self.hex4()?;
                let code = if (0xd800..0xdc00).contains(&high) {
                    if !(self.take(b'\\') && self.take(b'u')) {
                        return Err(self.error("half of a surrogate pair"));
                    }
                    let low = self.hex4()?;
                    if !(0xdc00..0xe000).contains(&low) {
                        return Err(self.error("half of a surrogate pair"));
                    }
                    0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00)
                } else {
                    high
                };
                char::from_u32(code).ok_or_else(|| self.error("not a character"))?
            }
            // `at` may now stand inside a character or behind the end: only an error is made of it.
            _ => return Err(self.error("an unknown escape")),
        })
    }

    fn hex4(&mut self) -> Result<u32, String> {
        let digits = self.text.get(self.at..self.at + 4).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).ok_or_else(|| self.error("\\u needs four hex digits"))?;
        self.at += 4;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_and_spelling_are_kept() {
        let text = r#"{"b":1,"a":{"z":"x/y","y":[1,-2.50,true,null,false,1e5]},"":"\"\\\n\u0001"}"#;
        assert_eq!(Value::parse(text).unwrap().print(), text);
        assert_eq!(Value::parse(" { \"k\" : [ 1 , 2 ] } ").unwrap().print(), r#"{"k":[1,2]}"#);
        assert_eq!(Value::parse(r#""\u00e9\ud83d\ude00\/""#).unwrap(), Value::Text("é😀/".to_owned()));
    }

    #[test]
    fn refused() {
        for bad in [
            "",
            "{",
            "{}x",
            "{\"a\":1,}",
            "{\"a\":1,\"a\":2}",
            "[1,]",
            "01",
            "-",
            "1.",
            "1e",
            "\"\\ud800\"",
            "\"\\x\"",
            "\"\\",
            "\"a\nb\"",
            "tru",
            "{a:1}",
        ] {
            assert!(Value::parse(bad).is_err(), "{bad:?} was read");
        }
        let deep = "[".repeat(MAX_DEPTH + 2) + &"]".repeat(MAX_DEPTH + 2);
        assert!(Value::parse(&deep).unwrap_err().contains("deeper"));
        let long = format!("[{}0]", "0,".repeat(MAX_VALUES));
        assert!(Value::parse(&long).unwrap_err().contains("more than"));
    }

    #[test]
    fn numbers_of_luks2() {
        assert_eq!(Value::parse("\"16777216\"").unwrap().u64(), Some(16_777_216));
        for not in ["\"\"", "\"+1\"", "\"-1\"", "\" 1\"", "16777216", "\"18446744073709551616\""] {
            assert_eq!(Value::parse(not).unwrap().u64(), None, "{not}");
        }
        assert_eq!(Value::parse("4294967296").unwrap().u32(), None);
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(5, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                prop::collection::hash_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into()),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = Value::parse(&text);
        }

        #[test]
        fn no_almost_json_panics(text in r#"[\[\]{}:,"\\ubn0-9eE.+\-a-f ]{0,40}"#) {
            // serde_json takes a key that stands twice; beside that both agree on what is JSON.
            match Value::parse(&text) {
                Ok(value) => prop_assert!(serde_json::from_str::<serde_json::Value>(&value.print()).is_ok() || value.print().contains(['e', 'E'])),
                Err(why) => prop_assert!(serde_json::from_str::<serde_json::Value>(&text).is_err() || why.contains("twice"), "{text}: {why}"),
            }
        }

        #[test]
        fn agrees_with_serde_json(json in any_json()) {
            let text = json.to_string();
            let ours = Value::parse(&text).unwrap().print();
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&ours).unwrap(), json);
        }
    }
}
