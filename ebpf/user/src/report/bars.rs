//! Bars and histograms made of block characters.

/// Heights of an eighth to a whole.
const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Widths of an eighth to seven.
const WIDTHS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// A histogram of sorted values in `columns` columns, from the smallest to the largest on a
/// logarithmic scale, since durations span magnitudes. A column with any value in it is never empty.
pub(crate) fn histogram(sorted: &[i64], columns: usize) -> String {
    let counts = counts(sorted, columns);
    let most = counts.iter().copied().max().unwrap_or(0);
    let column = |count: &usize| match count {
        0 => ' ',
        count => {
            let eighths = (count * HEIGHTS.len()).div_ceil(most.max(1));
            HEIGHTS
                .get(eighths.saturating_sub(1))
                .copied()
                .unwrap_or('█')
        }
    };
    counts.iter().map(column).collect()
}

/// How many of the sorted values fall into each of `columns` parts of their range, which are equal
/// on a logarithmic scale.
pub(crate) fn counts(sorted: &[i64], columns: usize) -> Vec<usize> {
    let mut counts = vec![0; columns];
    let log = |value: i64| (value.max(1) as f64).ln();
    let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else {
        return counts;
    };
    let (low, width) = (log(*min), log(*max) - log(*min));
    for value in sorted {
        let place = if width > 0.0 {
            (log(*value) - low) / width
        } else {
            // All the same: in the middle.
            0.5
        };
        let index = ((place * columns as f64) as usize).min(columns.saturating_sub(1));
        if let Some(count) = counts.get_mut(index) {
            *count += 1;
        }
    }
    counts
}

/// A bar over `share` of `columns` columns, to an eighth of one.
pub(crate) fn share(share: f64, columns: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * columns as f64 * 8.0).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    bar.extend(
        (eighths % 8)
            .checked_sub(1)
            .and_then(|part| WIDTHS.get(part)),
    );
    let empty = columns.saturating_sub(bar.chars().count());
    bar + &" ".repeat(empty)
}

/// A bar from `start` to `end`, shares of the whole, in `columns` columns: where a span lies. Half
/// columns are drawn; a span that is too short for one still leaves a mark.
pub(crate) fn place(start: f64, end: f64, columns: usize) -> String {
    let halves = |share: f64| (share.clamp(0.0, 1.0) * columns as f64 * 2.0).round() as usize;
    let most = columns.saturating_mul(2);
    let first = halves(start).min(most.saturating_sub(1));
    let last = halves(end);
    let filled = |half: usize| (first..last).contains(&half);
    let column = |column: usize| match (filled(2 * column), filled(2 * column + 1)) {
        (true, true) => '█',
        (true, false) => '▌',
        (false, true) => '▐',
        (false, false) if last <= first && column == first / 2 => {
            if first.is_multiple_of(2) {
                '▏'
            } else {
                '▕'
            }
        }
        (false, false) => ' ',
    };
    (0..columns).map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_shows_each_value() {
        assert_eq!(histogram(&[], 4), "    ");
        assert_eq!(histogram(&[7, 7], 3), " █ ");
        assert_eq!(histogram(&[10, 10, 10, 10, 100, 1_000], 3), "█▂▂");
        assert_eq!(histogram(&[0, 0, i64::MAX], 2), "█▄");
    }

    #[test]
    fn a_bar_is_as_long_as_its_share() {
        assert_eq!(share(0.5, 4), "██  ");
        assert_eq!(share(0.30, 4), "█▎  ");
        assert_eq!(share(7.0, 2), "██");
        assert_eq!(share(f64::NAN, 2), "  ");
    }

    #[test]
    fn a_place_is_never_invisible() {
        assert_eq!(place(0.0, 1.0, 3), "███");
        assert_eq!(place(0.5, 1.0, 3), " ▐█");
        assert_eq!(place(0.0, 0.01, 3), "▏  ");
        assert_eq!(place(1.0, 1.0, 3), "  ▐");
        assert_eq!(place(-1.0, 9.0, 2), "██");
    }
}
