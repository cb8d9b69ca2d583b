//! Options that consist of `key=value` pairs and words between commas.

/// The pairs of one option, each to be asked for once.
pub(super) struct Pairs<'a>(Vec<(&'a str, Option<&'a str>)>);

impl<'a> Pairs<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        let pairs = text.split(',').filter(|pair| !pair.is_empty());
        Pairs(
            pairs
                .map(|pair| match pair.split_once('=') {
                    Some((key, value)) => (key, Some(value)),
                    None => (pair, None),
                })
                .collect(),
        )
    }

    pub(super) fn take(&mut self, key: &str) -> Option<Option<&'a str>> {
        let at = self.0.iter().position(|(name, _)| *name == key)?;
        Some(self.0.remove(at).1)
    }

    pub(super) fn value(&mut self, key: &str) -> Result<Option<&'a str>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(None | Some("")) => Err(format!("'{key}' needs a value, as {key}=VALUE")),
            Some(value) => Ok(value),
        }
    }

    pub(super) fn required(&mut self, key: &str) -> Result<&'a str, String> {
        self.value(key)?
            .ok_or_else(|| format!("'{key}=' is missing"))
    }

    pub(super) fn word(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(_)) => Err(format!("'{key}' takes no value")),
        }
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), String> {
        match self.0.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!("unknown or repeated: '{key}'")),
        }
    }
}
