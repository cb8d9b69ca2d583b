//! Reads `transcript.txt` and judges answers by it. Compiled into the QMP server's unit tests and
//! into the integration tests, which both replay it.

use serde_json::Value;

/// One request and what QEMU sends back.
pub(super) struct Row {
    /// The bytes that the client sends.
    pub(super) request: String,
    /// The lines that come back, in order, without timestamps.
    pub(super) answers: Vec<Value>,
}

/// The transcript's rows, in order: they are one client's dialogue.
pub(super) fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in include_str!("transcript.txt").lines() {
        if let Some(request) = line.strip_prefix("> ") {
            rows.push(Row {
                request: request.replace('␤', "\n").replace('␁', "\x01") + "\n",
                answers: Vec::new(),
            });
        } else if let (Some(answer), Some(row)) = (line.strip_prefix("< "), rows.last_mut()) {
            let answer = serde_json::from_str(answer).expect("an answer in the transcript");
            row.answers.push(answer);
        } else if let (Some(answer), Some(row)) = (line.strip_prefix("~ "), rows.last_mut()) {
            let mut answer: Value = serde_json::from_str(answer).expect("an answer");
            answer["error"]["desc"] = Value::Null;
            row.answers.push(answer);
        }
    }
    assert!(
        rows.len() > 150,
        "{} rows: the transcript is cut",
        rows.len()
    );
    rows
}

/// Whether `ours` says what QEMU says; the transcript's head tells how far they may differ.
pub(super) fn agrees(ours: &Value, qemus: &Value) -> bool {
    let (Some(ours), Some(qemus)) = (ours.as_object(), qemus.as_object()) else {
        return false;
    };
    let same = |(key, value): (&String, &Value)| match (key.as_str(), qemus.get(key)) {
        ("error", Some(error)) if is_syntax(error) => {
            is_syntax(value) && value["class"] == error["class"]
        }
        ("error", Some(error)) if error["desc"].is_null() => {
            value["class"] == error["class"] && value["desc"].is_string()
        }
        ("return", Some(Value::Object(all))) => value
            .as_object()
            .is_some_and(|some| some.iter().all(|(key, value)| all.get(key) == Some(value))),
        // Of a list's entries ours may have fewer.
        ("return", Some(Value::Array(all))) => value.as_array().is_some_and(|some| {
            some.iter()
                .all(|entry| all.contains(entry) || is_newer(entry))
        }),
        ("timestamp", None) => value["seconds"].is_u64() && value["microseconds"].is_u64(),
        (_, theirs) => theirs == Some(value),
    };
    ours.iter().all(same) && qemus.keys().all(|key| ours.contains_key(key))
}

/// Whether this is a capability that a later QEMU has than the one that was asked: 9.0's.
fn is_newer(entry: &Value) -> bool {
    entry["capability"] == "mapped-ram"
}

fn is_syntax(error: &Value) -> bool {
    let text = error["desc"].as_str().unwrap_or_default();
    text.starts_with("JSON parse error")
}
