//! Label selectors (from text and from messages) and field selectors.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use orlop_proto::meta::v1::LabelSelector;

use super::{Model, names};

/// The longest text of a selector that is read.
const TEXT_MAX: usize = 64 * 1024;

/// A selector's text or message has no meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

/// How a requirement looks at a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operator {
    /// The label is one of the values (`=`, `==`, `in`).
    In,
    /// The label is absent or none of the values (`!=`, `notin`).
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
    /// The label is an integer greater than the value.
    Gt,
    /// The label is an integer less than the value.
    Lt,
}

impl Operator {
    /// From the name that selectors in messages use.
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "In" => Self::In,
            "NotIn" => Self::NotIn,
            "Exists" => Self::Exists,
            "DoesNotExist" => Self::DoesNotExist,
            "Gt" => Self::Gt,
            "Lt" => Self::Lt,
            _ => return None,
        })
    }

    /// Whether a label (`None`: absent) satisfies the operator with these values.
    pub fn matches(self, label: Option<&str>, values: &[String]) -> bool {
        let contained = |label: &str| values.iter().any(|value| value == label);
        match (self, label) {
            (Self::In, Some(label)) => contained(label),
            (Self::NotIn, Some(label)) => !contained(label),
            (Self::Exists, label) => label.is_some(),
            (Self::DoesNotExist, label) => label.is_none(),
            (Self::NotIn, None) => true,
            (Self::In | Self::Gt | Self::Lt, None) => false,
            (Self::Gt | Self::Lt, Some(label)) => {
                let bound = values.first().and_then(|value| value.parse::<i64>().ok());
                match (label.parse::<i64>().ok(), bound) {
                    (Some(label), Some(bound)) if self == Self::Gt => label > bound,
                    (Some(label), Some(bound)) => label < bound,
                    _ => false,
                }
            }
        }
    }
}

/// One condition on the labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

/// A label selector: the conjunction of its requirements.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Selector {
    requirements: Vec<Requirement>,
    /// Matches nothing, whatever the requirements.
    nothing: bool,
}

impl Selector {
    /// Matches every object.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Matches no object.
    pub fn nothing() -> Self {
        Self {
            requirements: Vec::new(),
            nothing: true,
        }
    }

    /// Every label of the map, as it is. An empty map matches everything.
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Self {
        let requirement = |(key, value): (&String, &String)| Requirement {
            key: key.clone(),
            operator: Operator::In,
            values: vec![value.clone()],
        };
        Self {
            requirements: labels.iter().map(requirement).collect(),
            nothing: false,
        }
    }

    /// From a message; an absent one matches nothing, an empty one everything.
    pub fn from_message(message: Option<&LabelSelector>) -> Result<Self, SelectorError> {
        let Some(message) = message else {
            return Ok(Self::nothing());
        };
        let mut selector = Self::from_labels(&message.match_labels);
        for expression in &message.match_expressions {
            let operator = match Operator::by_name(&expression.operator) {
                Some(Operator::Gt | Operator::Lt) | None => {
                    return Err(SelectorError(format!(
                        "{:?} is not a valid label selector operator",
                        expression.operator
                    )));
                }
                Some(operator) => operator,
            };
            selector.push(expression.key.clone(), operator, expression.values.clone())?;
        }
        Ok(selector)
    }

    /// From text: `app=web,tier in (a, b),!old`. An empty text matches everything.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        if text.len() > TEXT_MAX {
            return Err(SelectorError(format!(
                "a label selector may not be more than {TEXT_MAX} bytes"
            )));
        }
        Parser {
            tokens: tokens(text),
            position: 0,
        }
        .selector()
    }

    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.nothing
            && self.requirements.iter().all(|one| {
                one.operator
                    .matches(labels.get(&one.key).map(String::as_str), &one.values)
            })
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// Whether it selects nothing by its nature.
    pub fn is_nothing(&self) -> bool {
        self.nothing
    }

    /// The labels that whatever is selected must have, with these values: what an index is asked for.
    pub fn required_labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.requirements
            .iter()
            .filter_map(|one| match (one.operator, one.values.as_slice()) {
                (Operator::In, [value]) => Some((one.key.as_str(), value.as_str())),
                _ => None,
            })
    }

    fn push(&mut self, key: String, operator: Operator, values: Vec<String>) -> Result<(), SelectorError> {
        names::qualified_name(&key).map_err(|error| SelectorError(format!("key {key:?}: {error}")))?;
        let count_is_right = match operator {
            Operator::In | Operator::NotIn => !values.is_empty(),
            Operator::Exists | Operator::DoesNotExist => values.is_empty(),
            Operator::Gt | Operator::Lt => values.len() == 1 && values[0].parse::<i64>().is_ok(),
        };
        if !count_is_right {
            return Err(SelectorError(format!(
                "key {key:?}: the values do not fit the operator"
            )));
        }
        for value in &values {
            names::label_value(value).map_err(|error| SelectorError(format!("value {value:?}: {error}")))?;
        }
        self.requirements.push(Requirement { key, operator, values });
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Symbol(&'static str),
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(text) => write!(formatter, "{text:?}"),
            Self::Symbol(text) => write!(formatter, "{text:?}"),
        }
    }
}

/// Longer symbols first.
const SYMBOLS: [&str; 9] = ["==", "!=", "=", "!", ",", "(", ")", ">", "<"];

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(symbol) = SYMBOLS.into_iter().find(|symbol| rest.starts_with(symbol)) {
            tokens.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || "=!,()<>".contains(c))
                .unwrap_or(rest.len());
            tokens.push(Token::Word(&rest[..end]));
            rest = &rest[end..];
        }
        rest = rest.trim_start();
    }
    tokens
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    position: usize,
}

impl<'a> Parser<'a> {
    fn selector(mut self) -> Result<Selector, SelectorError> {
        let mut selector = Selector::everything();
        if self.tokens.is_empty() {
            return Ok(selector);
        }
        loop {
            let (key, operator, values) = self.requirement()?;
            selector.push(key, operator, values)?;
            match self.next() {
                None => return Ok(selector),
                Some(Token::Symbol(",")) => {}
                Some(token) => {
                    return Err(SelectorError(format!(
                        "found {token}, expected: ',' or end of the selector"
                    )));
                }
            }
        }
    }

    fn requirement(&mut self) -> Result<(String, Operator, Vec<String>), SelectorError> {
        if self.take("!") {
            return Ok((self.word("a key")?.to_owned(), Operator::DoesNotExist, Vec::new()));
        }
        let key = self.word("a key")?.to_owned();
        let (operator, values) = match self.peek() {
            None | Some(Token::Symbol(",")) => (Operator::Exists, Vec::new()),
            Some(Token::Symbol("=" | "==")) => (Operator::In, self.value()),
            Some(Token::Symbol("!=")) => (Operator::NotIn, self.value()),
            Some(Token::Symbol(">")) => (Operator::Gt, self.value()),
            Some(Token::Symbol("<")) => (Operator::Lt, self.value()),
            Some(Token::Word("in")) => (Operator::In, self.values()?),
            Some(Token::Word("notin")) => (Operator::NotIn, self.values()?),
            Some(token) => return Err(SelectorError(format!("found {token}, expected an operator"))),
        };
        Ok((key, operator, values))
    }

    /// What stands after an operator: a word, or nothing, which is the empty value.
    fn value(&mut self) -> Vec<String> {
        self.position += 1;
        let value = match self.peek() {
            Some(Token::Word(word)) => {
                let word = (*word).to_owned();
                self.position += 1;
                word
            }
            _ => String::new(),
        };
        vec![value]
    }

    /// `(a, b)` after `in` or `notin`.
    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        self.position += 1;
        self.expect("(")?;
        let mut values = Vec::new();
        if self.take(")") {
            return Ok(values);
        }
        loop {
            match self.peek() {
                Some(Token::Word(word)) => {
                    values.push((*word).to_owned());
                    self.position += 1;
                }
                _ => values.push(String::new()),
            }
            if self.take(")") {
                return Ok(values);
            }
            self.expect(",")?;
        }
    }

    fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.position)
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.tokens.get(self.position).cloned();
        self.position += 1;
        token
    }

    fn take(&mut self, symbol: &str) -> bool {
        let found = self
            .peek()
            .is_some_and(|token| matches!(token, Token::Symbol(found) if *found == symbol));
        self.position += usize::from(found);
        found
    }

    fn expect(&mut self, symbol: &str) -> Result<(), SelectorError> {
        if self.take(symbol) {
            return Ok(());
        }
        let found = self.peek().map_or_else(|| "the end".to_owned(), ToString::to_string);
        Err(SelectorError(format!("found {found}, expected: '{symbol}'")))
    }

    fn word(&mut self, what: &str) -> Result<&'a str, SelectorError> {
        match self.next() {
            Some(Token::Word(word)) => Ok(word),
            Some(token) => Err(SelectorError(format!("found {token}, expected {what}"))),
            None => Err(SelectorError(format!("found the end, expected {what}"))),
        }
    }
}

/// A field selector for one kind: the conjunction of its terms.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Term {
    field: String,
    equal: bool,
    value: String,
}

impl FieldSelector {
    /// From text, `metadata.name=x,status.phase!=Running`, for objects of a kind. `\` escapes `,`, `=` and itself in values.
    pub fn parse<T: Model>(text: &str) -> Result<Self, SelectorError> {
        if text.len() > TEXT_MAX {
            return Err(SelectorError(format!(
                "a field selector may not be more than {TEXT_MAX} bytes"
            )));
        }
        let empty = T::default();
        let mut terms = Vec::new();
        for part in split_unescaped(text) {
            if part.is_empty() {
                continue;
            }
            let term = term(part)?;
            if empty.selectable_field(&term.field).is_none() {
                return Err(SelectorError(format!(
                    "field label not supported: {}",
                    term.field.escape_debug()
                )));
            }
            terms.push(term);
        }
        Ok(Self { terms })
    }

    /// Whether the object is selected.
    pub fn matches<T: Model>(&self, object: &T) -> bool {
        self.terms.iter().all(|term| {
            let value = object.selectable_field(&term.field).unwrap_or(Cow::Borrowed(""));
            (value == term.value.as_str()) == term.equal
        })
    }

    /// The value that a field must have, when the selector says so: what makes a look-up of one object, or of one node's pods.
    pub fn required(&self, field: &str) -> Option<&str> {
        self.terms
            .iter()
            .find(|term| term.equal && term.field == field)
            .map(|term| term.value.as_str())
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }
}

fn split_unescaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (index, c) in text.char_indices() {
        if c == ',' && !escaped {
            parts.push(&text[start..index]);
            start = index + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    parts.push(&text[start..]);
    parts
}

fn term(text: &str) -> Result<Term, SelectorError> {
    let position = text
        .find('=')
        .ok_or_else(|| SelectorError(format!("invalid selector: {text:?}: no '=' or '!='")))?;
    let (equal, field) = match text[..position].strip_suffix('!') {
        Some(field) => (false, field),
        None => (true, &text[..position]),
    };
    let raw = &text[position + 1..];
    let raw = if equal {
        raw.strip_prefix('=').unwrap_or(raw)
    } else {
        raw
    };
    let mut value = String::new();
    let mut characters = raw.chars();
    while let Some(c) = characters.next() {
        match c {
            '\\' => match characters.next() {
                Some(escaped @ ('\\' | ',' | '=')) => value.push(escaped),
                _ => {
                    return Err(SelectorError(format!(
                        "invalid field selector: invalid escape sequence in {text:?}"
                    )));
                }
            },
            '=' => {
                return Err(SelectorError(format!(
                    "invalid field selector: unescaped character in value: {text:?}"
                )));
            }
            c => value.push(c),
        }
    }
    Ok(Term {
        field: field.trim().to_owned(),
        equal,
        value,
    })
}

#[cfg(test)]
mod tests;
