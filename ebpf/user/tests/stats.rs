//! The tool's statistics against SciPy's.

use blackout::stats::{rank, shift};
use serde::Deserialize;

/// Made by `stats/vectors.py`.
const VECTORS: &str = include_str!("stats/vectors.json");

#[derive(Deserialize)]
struct Case {
    kind: String,
    first: Vec<i64>,
    second: Vec<i64>,
    p: f64,
    shift: f64,
}

#[test]
fn p_values_and_shifts_are_scipys() {
    let cases: Vec<Case> = serde_json::from_str(VECTORS).unwrap();
    assert_eq!(cases.len(), 15);
    for mut case in cases {
        case.first.sort_unstable();
        case.second.sort_unstable();
        let p = rank::p_larger(&case.first, &case.second);
        let sizes = (case.first.len(), case.second.len());
        assert!(
            (p - case.p).abs() < 1e-9,
            "{} {sizes:?}: {p}, SciPy {}",
            case.kind,
            case.p
        );
        let shift = shift::hodges_lehmann(&case.first, &case.second).unwrap();
        assert!(
            (shift as f64 - case.shift).abs() <= 0.5,
            "{sizes:?}: {shift}, NumPy {}",
            case.shift
        );
    }
}
