//! Numbers as a person reads them.

/// A duration with its unit, at most 10 columns wide.
pub(crate) fn time(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.3} ms", value / 1e6),
        // Above, the decimals would round to a column more.
        1_000_000_000..9_999_999_500_000 => format!("{:.3} s", value / 1e9),
        9_999_999_500_000..99_999_900_000_000_000 => format!("{:.1} s", value / 1e9),
        // Only damaged recordings have such.
        _ => "> 3 years".to_owned(),
    }
}

/// A duration that may be negative, with its sign: a shift.
pub(crate) fn signed(ns: i64) -> String {
    let sign = if ns < 0 { '-' } else { '+' };
    format!("{sign}{}", time(ns.unsigned_abs()))
}

/// The nanoseconds of a number with its unit: `5ms`, `1.5 us`. `None` if it is none.
pub(crate) fn parse_time(text: &str) -> Option<u64> {
    let text = text.trim();
    let unit = text.find(|char: char| char != '.' && !char.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(unit)?;
    let scale = match unit.trim_start() {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return None,
    };
    let ns = number.parse::<f64>().ok()? * scale;
    (ns < 1e18).then_some(ns.round() as u64)
}

/// A share from 0 to 1 in percent. Never rounds up to the whole: 100 % means all of it.
pub(crate) fn percent(share: f64) -> String {
    let tenths = (share * 1e3).round();
    let tenths = if share < 1.0 {
        tenths.min(999.0)
    } else {
        tenths
    };
    format!("{:.1} %", tenths / 10.0)
}

/// `text` in at most `width` columns; an ellipsis stands for what was cut.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_the_microsecond() {
        assert_eq!(time(999), "999 ns");
        assert_eq!(time(1_250), "1.2 µs");
        assert_eq!(time(12_345_678), "12.346 ms");
        assert_eq!(time(2_000_000_000), "2.000 s");
        assert_eq!(time(9_999_999_000_000), "9999.999 s");
        assert_eq!(time(9_999_999_999_999), "10000.0 s");
        assert_eq!(time(u64::MAX), "> 3 years");
    }

    #[test]
    fn times_are_read_with_their_units() {
        assert_eq!(parse_time("5ms"), Some(5_000_000));
        assert_eq!(parse_time(" 1.5 µs"), Some(1_500));
        for wrong in ["", "5", "ms", "-5ms", "5 m", "1.2.3s", "99999999999s"] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
        assert_eq!(signed(-1_250), "-1.2 µs");
    }

    #[test]
    fn a_share_below_the_whole_never_reads_as_it() {
        assert_eq!(percent(0.999_99), "99.9 %");
        assert_eq!(percent(1.0), "100.0 %");
        assert_eq!(percent(0.0), "0.0 %");
    }

    #[test]
    fn a_cut_is_marked() {
        assert_eq!(cut("µµµµ", 4), "µµµµ");
        assert_eq!(cut("µµµµ", 3), "µµ…");
    }
}
