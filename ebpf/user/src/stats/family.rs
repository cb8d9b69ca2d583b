//! Many comparisons at once.

/// Holm's correction: p-values adjusted so that, if none of the differences is real, one or more of
/// them falls below α with a probability of at most α. In the order of `p`.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<_> = (0..p.len()).collect();
    order.sort_by(|a, b| value(p, *a).total_cmp(&value(p, *b)));
    let mut adjusted = vec![1.0; p.len()];
    let mut worst = 0.0_f64;
    for (place, index) in order.into_iter().enumerate() {
        worst = worst
            .max((p.len() - place) as f64 * value(p, index))
            .min(1.0);
        if let Some(adjusted) = adjusted.get_mut(index) {
            *adjusted = worst;
        }
    }
    adjusted
}

fn value(p: &[f64], index: usize) -> f64 {
    p.get(index).copied().unwrap_or(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_holm_has_it() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005]);
        let expected = [0.03, 0.06, 0.06, 0.02];
        for (adjusted, expected) in adjusted.iter().zip(expected) {
            assert!((adjusted - expected).abs() < 1e-12, "{adjusted} {expected}");
        }
        assert!(holm(&[]).is_empty());
        assert!(holm(&[0.9, 0.8]).iter().all(|p| *p <= 1.0));
    }
}
