//! Random numbers as a function of their place: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
//! as easy as 1, 2, 3", SC 2011), keyed by the seed, counted by (output position, choice).

const ROUNDS: u32 = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// A number in `[0, 1)` with 53 random bits, for the token at `position` of answer `choice`.
pub(super) fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    // The two words left at zero number further draws of a position, and further purposes.
    let [high, low, _, _] = block([position, choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

fn block(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_equal_the_known_answers_of_the_authors_library() {
        assert_eq!(block([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(block([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn seed_choice_and_position_each_change_the_number() {
        let numbers = [uniform(1, 0, 0), uniform(2, 0, 0), uniform(1 << 32, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1)];
        for (i, a) in numbers.iter().enumerate() {
            assert!((0.0..1.0).contains(a));
            assert!(numbers[i + 1..].iter().all(|b| a != b), "{numbers:?}");
        }
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let mut bins = [0u32; 16];
        for position in 0..16_000 {
            bins[(uniform(7, 0, position) * 16.0) as usize] += 1;
        }
        // Chi-square with 15 degrees of freedom: 37.7 is exceeded once in a thousand; the numbers are fixed.
        let chi_square: f64 = bins.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi_square < 37.7, "{chi_square} {bins:?}");
    }
}
