//! Several models, one budget: who gets what when there is not enough for all.
//!
//! Weighted max–min fairness over what exceeds the minimum, in whole replicas: nobody gets more than it asks for, and nobody
//! who asks for more has less per weight, by more than one replica, than another has.

/// What one model asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Claim {
    /// Replicas that it keeps whatever happens.
    pub min: u32,
    /// Replicas that it wants.
    pub desired: u32,
    /// Units of the budget, such as GPUs, that one replica takes; 0 for none.
    pub cost: u32,
    /// Its share relative to others, above 0.
    pub weight: f64,
}

/// Replicas for each claim, in order. Minima are granted even beyond the budget: what cannot be scheduled is Kubernetes' to
/// say.
pub fn allocate(claims: &[Claim], budget: u64) -> Vec<u32> {
    let mut granted: Vec<u32> = claims.iter().map(|claim| claim.min.min(claim.desired)).collect();
    let spent: u64 = claims.iter().zip(&granted).map(|(claim, count)| u64::from(claim.cost) * u64::from(*count)).sum();
    let mut left = budget.saturating_sub(spent);
    let level = |claim: &Claim, count: u32| {
        let weight = if claim.weight.is_finite() && claim.weight > 0.0 { claim.weight } else { f64::MIN_POSITIVE };
        f64::from(count) * f64::from(claim.cost) / weight
    };
    let mut open = std::collections::BinaryHeap::new();
    for (index, claim) in claims.iter().enumerate() {
        if claim.cost == 0 {
            granted[index] = claim.desired;
        } else if granted[index] < claim.desired {
            open.push(Next { level: level(claim, granted[index] + 1), index });
        }
    }
    while let Some(Next { index, .. }) = open.pop() {
        let claim = &claims[index];
        if u64::from(claim.cost) > left {
            continue;
        }
        left -= u64::from(claim.cost);
        granted[index] += 1;
        if granted[index] < claim.desired {
            open.push(Next { level: level(claim, granted[index] + 1), index });
        }
    }
    granted
}

/// A replica that may be granted next: the lowest level first, then the first claim.
#[derive(PartialEq)]
struct Next {
    level: f64,
    index: usize,
}

impl Eq for Next {}

impl Ord for Next {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.level.total_cmp(&self.level).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(min: u32, desired: u32, weight: f64) -> Claim {
        Claim { min, desired, cost: 1, weight }
    }

    #[test]
    fn enough_for_all_gives_all_what_they_want() {
        assert_eq!(allocate(&[claim(1, 4, 1.0), claim(1, 2, 1.0)], 10), [4, 2]);
    }

    #[test]
    fn too_little_is_shared_evenly_or_by_weight_and_nobody_gets_more_than_it_wants() {
        assert_eq!(allocate(&[claim(1, 9, 1.0), claim(1, 9, 1.0), claim(1, 2, 1.0)], 10), [4, 4, 2]);
        assert_eq!(allocate(&[claim(0, 9, 2.0), claim(0, 9, 1.0)], 9), [6, 3]);
    }

    #[test]
    fn minima_are_granted_beyond_the_budget() {
        assert_eq!(allocate(&[claim(3, 9, 1.0), claim(2, 2, 1.0)], 1), [3, 2]);
    }

    #[test]
    fn a_dear_model_does_not_block_a_cheap_one() {
        let dear = Claim { min: 0, desired: 2, cost: 8, weight: 100.0 };
        assert_eq!(allocate(&[dear, claim(0, 5, 1.0)], 7), [0, 5]);
    }

    #[test]
    fn no_more_than_the_budget_is_granted_above_the_minima() {
        for budget in 0..40 {
            let claims = [claim(1, 9, 0.5), Claim { cost: 3, ..claim(1, 7, 2.0) }, claim(0, 3, f64::NAN)];
            let granted = allocate(&claims, budget);
            let spent: u64 =
                granted.iter().zip(&claims).map(|(count, claim)| u64::from(*count) * u64::from(claim.cost)).sum();
            assert!(spent <= budget.max(4), "{budget}: {granted:?}");
        }
    }
}
