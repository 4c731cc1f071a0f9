use super::*;

const VOCAB: usize = 1000;

/// Logits of a distribution that is neither flat nor sorted.
fn logits() -> Vec<f32> {
    (0..VOCAB).map(|token| ((token * 7919 % VOCAB) as f32 / 90.0).powi(2) * 0.1).collect()
}

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params, 0, VOCAB, &[], &[]).unwrap()
}

fn draw(params: &SamplingParams, position: u32) -> u32 {
    sampler(params.clone()).sample(&mut logits(), position, Narrowing::default(), &mut Scratch::default()).unwrap().id
}

fn banning<'a>(banned: &'a [&'a [u32]]) -> Narrowing<'a> {
    Narrowing { banned, ..Narrowing::default() }
}

/// How often each token is drawn, over many positions.
fn frequencies(params: &SamplingParams, draws: u32) -> Vec<u32> {
    let mut counts = vec![0; VOCAB];
    let mut scratch = Scratch::default();
    for position in 0..draws {
        let chosen =
            sampler(params.clone()).sample(&mut logits(), position, Narrowing::default(), &mut scratch).unwrap();
        counts[chosen.id as usize] += 1;
    }
    counts
}

/// The distribution that the filters define, worked out by a full sort in f64.
fn reference(params: &SamplingParams) -> Vec<f64> {
    let logits = logits();
    let mut order: Vec<usize> = (0..VOCAB).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    let weight = |token: usize| (f64::from(logits[token] - logits[order[0]]) / f64::from(params.temperature)).exp();
    let mut kept = order.clone();
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    kept.retain(|&token| weight(token) >= f64::from(params.min_p));
    let total: f64 = kept.iter().map(|&token| weight(token)).sum();
    let mut sum = 0.0;
    let size = kept.iter().position(|&token| {
        sum += weight(token);
        sum >= total * f64::from(params.top_p)
    });
    kept.truncate(size.map_or(VOCAB, |size| size + 1));
    let total: f64 = kept.iter().map(|&token| weight(token)).sum();
    let mut probabilities = vec![0.0; VOCAB];
    for token in kept {
        probabilities[token] = weight(token) / total;
    }
    probabilities
}

#[test]
fn temperature_zero_takes_the_best_token_and_the_first_among_equals() {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let mut tied = vec![0.0; VOCAB];
    (tied[700], tied[300]) = (2.0, 2.0);
    let chosen = sampler(greedy).sample(&mut tied, 0, Narrowing::default(), &mut Scratch::default()).unwrap();
    assert_eq!(chosen, Chosen { id: 300, logprobs: None });
}

#[test]
fn every_combination_of_filters_draws_from_the_distribution_it_defines() {
    let plain = SamplingParams { temperature: 0.8, seed: 11, ..SamplingParams::default() };
    let combinations = [
        plain.clone(),
        SamplingParams { top_k: 7, ..plain.clone() },
        SamplingParams { top_p: 0.6, ..plain.clone() },
        SamplingParams { min_p: 0.2, ..plain.clone() },
        SamplingParams { top_k: 40, top_p: 0.9, ..plain.clone() },
        SamplingParams { top_p: 0.9, min_p: 0.05, ..plain.clone() },
        SamplingParams { top_k: 30, top_p: 0.8, min_p: 0.1, temperature: 1.7, ..plain.clone() },
        SamplingParams { top_p: 0.9999, temperature: 2.0, ..plain },
    ];
    for params in combinations {
        let draws = 4000;
        let counts = frequencies(&params, draws);
        let probabilities = reference(&params);
        let (mut chi_square, mut degrees) = (0.0, 0.0);
        let mut rare = (0.0, 0.0);
        for (&count, &probability) in counts.iter().zip(&probabilities) {
            assert!(probability > 0.0 || count == 0, "a token outside the filters was drawn: {params:?}");
            let expected = probability * f64::from(draws);
            if expected >= 5.0 {
                chi_square += (f64::from(count) - expected).powi(2) / expected;
                degrees += 1.0;
            } else {
                rare = (rare.0 + f64::from(count), rare.1 + expected);
            }
        }
        if rare.1 >= 5.0 {
            chi_square += (rare.0 - rare.1).powi(2) / rare.1;
            degrees += 1.0;
        }
        // Mean n, deviation sqrt(2n): four deviations. The numbers are fixed by the seed.
        assert!(chi_square < degrees + 4.0 * (2.0f64 * degrees).sqrt(), "{chi_square} for {degrees}: {params:?}");
    }
}

#[test]
fn a_token_depends_on_seed_choice_and_position_only() {
    let params = SamplingParams { seed: 42, ..SamplingParams::default() };
    let first: Vec<u32> = (0..50).map(|position| draw(&params, position)).collect();
    let again: Vec<u32> = (0..50).rev().map(|position| draw(&params, position)).collect();
    assert!(first.iter().eq(again.iter().rev()));
    let other_seed = SamplingParams { seed: 43, ..params.clone() };
    assert_ne!(first, (0..50).map(|position| draw(&other_seed, position)).collect::<Vec<_>>());
    let mut other_choice = Sampler::new(params, 1, VOCAB, &[], &[]).unwrap();
    let mut scratch = Scratch::default();
    let other: Vec<u32> = (0..50)
        .map(|position| other_choice.sample(&mut logits(), position, Narrowing::default(), &mut scratch).unwrap().id)
        .collect();
    assert_ne!(first, other);
}

#[test]
fn temperatures_next_to_zero_and_extreme_logits_choose_the_best_token() {
    for temperature in [1e-45, 1e-20, 1e-5] {
        let params = SamplingParams { temperature, top_p: 0.9, ..SamplingParams::default() };
        let best = softmax::argmax(&logits()).unwrap().id;
        assert_eq!(draw(&params, 3), best, "at {temperature}");
    }
    let mut extreme = vec![-3e38; VOCAB];
    extreme[5] = 3e38;
    let chosen =
        sampler(SamplingParams::default()).sample(&mut extreme, 0, Narrowing::default(), &mut Scratch::default());
    assert_eq!(chosen.unwrap().id, 5);
}

#[test]
fn logprobs_are_those_of_the_raw_distribution() {
    let params = SamplingParams {
        temperature: 0.0,
        logit_bias: vec![(123, 100.0)],
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let chosen = sampler(params).sample(&mut logits(), 0, Narrowing::default(), &mut Scratch::default()).unwrap();
    assert_eq!(chosen.id, 123);
    let raw = logits();
    let log_sum_exp = raw.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
    let logprobs = chosen.logprobs.unwrap();
    assert!((f64::from(logprobs.chosen) - (f64::from(raw[123]) - log_sum_exp)).abs() < 1e-4);
    assert_eq!(logprobs.top.len(), 3);
    assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
    for (token, logprob) in logprobs.top {
        assert!((f64::from(logprob) - (f64::from(raw[token as usize]) - log_sum_exp)).abs() < 1e-4);
    }
}

#[test]
fn no_logprobs_are_worked_out_unless_asked_for() {
    let none = sampler(SamplingParams::default())
        .sample(&mut logits(), 0, Narrowing::default(), &mut Scratch::default())
        .unwrap();
    assert_eq!(none.logprobs, None);
    let chosen_only = SamplingParams { logprobs: Some(0), ..SamplingParams::default() };
    let chosen = sampler(chosen_only).sample(&mut logits(), 0, Narrowing::default(), &mut Scratch::default()).unwrap();
    assert_eq!(chosen.logprobs.map(|logprobs| logprobs.top), Some(vec![]));
}

#[test]
fn penalties_follow_their_definitions() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SamplingParams::default()
    };
    let history = History::new(&params, &[1, 2, 9_999_999], &[2, 3, 3]);
    let mut row = vec![4.0, 4.0, 4.0, 4.0, 4.0];
    history.apply(&params, &mut row);
    assert_eq!(row, [4.0, 2.0, 2.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.5, 4.0]);
    let mut negative = vec![-4.0; 5];
    history.apply(&params, &mut negative);
    assert_eq!(negative, [-4.0, -8.0, -8.0 - 0.75, -8.0 - 1.0, -4.0]);
}

#[test]
fn presence_and_frequency_look_at_the_output_only() {
    let params = SamplingParams { presence_penalty: 1.0, frequency_penalty: 1.0, ..SamplingParams::default() };
    let mut row = vec![0.0; 3];
    History::new(&params, &[0, 1], &[1]).apply(&params, &mut row);
    assert_eq!(row, [0.0, -2.0, 0.0]);
}

#[test]
fn a_chosen_token_is_penalised_from_the_next_one_on() {
    let params = SamplingParams { temperature: 0.0, frequency_penalty: 2.0, ..SamplingParams::default() };
    let mut sampler = sampler(params);
    let mut row = vec![0.0; VOCAB];
    (row[8], row[9]) = (3.0, 2.0);
    let mut scratch = Scratch::default();
    let ids: Vec<u32> = (0..4)
        .map(|position| sampler.sample(&mut row.clone(), position, Narrowing::default(), &mut scratch).unwrap().id)
        .collect();
    assert_eq!(ids, [8, 9, 8, 0]);
}

#[test]
fn a_sampler_that_resumes_equals_one_that_never_stopped() {
    let params = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.7,
        bad_words: vec![vec![991, 868], vec![5]],
        seed: 5,
        ..SamplingParams::default()
    };
    let mut whole = Sampler::new(params.clone(), 2, VOCAB, &[1, 2], &[]).unwrap();
    let mut scratch = Scratch::default();
    let mut output = Vec::new();
    for position in 0..40 {
        let mut resumed = Sampler::new(params.clone(), 2, VOCAB, &[1, 2], &output).unwrap();
        let token = whole.sample(&mut logits(), position, Narrowing::default(), &mut scratch).unwrap().id;
        assert_eq!(resumed.sample(&mut logits(), position, Narrowing::default(), &mut scratch).unwrap().id, token);
        output.push(token);
    }
}

#[test]
fn bad_words_are_never_completed_and_banned_tokens_never_chosen() {
    let params = SamplingParams {
        temperature: 0.0,
        bad_words: vec![vec![7], vec![8, 8, 9]],
        logit_bias: vec![(6, -100.0)],
        ..SamplingParams::default()
    };
    let mut scratch = Scratch::default();
    let mut row = vec![0.0; VOCAB];
    (row[7], row[6], row[5], row[9], row[8]) = (9.0, 8.0, 7.0, 6.0, 5.0);
    let mut after_one = Sampler::new(params.clone(), 0, VOCAB, &[8], &[8]).unwrap();
    assert_eq!(
        after_one.sample(&mut row.clone(), 1, banning(&[&[5]]), &mut scratch).unwrap().id,
        9,
        "the prompt does not count"
    );
    let mut after_two = Sampler::new(params, 0, VOCAB, &[], &[3, 8, 8]).unwrap();
    assert_eq!(after_two.sample(&mut row, 3, banning(&[&[5]]), &mut scratch).unwrap().id, 8);
}

#[test]
fn when_everything_is_forbidden_the_answer_ends_with_a_sentence() {
    let banned: Vec<u32> = (0..VOCAB as u32).collect();
    for temperature in [0.0, 1.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let result = sampler(params).sample(&mut logits(), 0, banning(&[&banned]), &mut Scratch::default());
        assert_eq!(result, Err(SampleError::NothingAllowed));
    }
}

#[test]
fn a_logit_that_is_not_finite_is_an_error_that_names_the_token() {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut row = logits();
        row[998] = odd;
        let result =
            sampler(SamplingParams::default()).sample(&mut row, 0, Narrowing::default(), &mut Scratch::default());
        assert_eq!(result, Err(SampleError::NotFinite(998)));
    }
}

#[test]
fn equal_logits_are_equally_likely() {
    let params = SamplingParams { seed: 3, ..SamplingParams::default() };
    let mut counts = [0u32; 8];
    let mut scratch = Scratch::default();
    for position in 0..8000 {
        let mut sampler = Sampler::new(params.clone(), 0, 8, &[], &[]).unwrap();
        counts[sampler.sample(&mut [1.5; 8], position, Narrowing::default(), &mut scratch).unwrap().id as usize] += 1;
    }
    assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
}

#[test]
fn only_tokens_of_the_mask_are_chosen_and_it_has_the_last_word() {
    let mask = Mask::of([5, 6], VOCAB);
    let params = SamplingParams { logit_bias: vec![(5, -100.0)], top_k: 1, ..SamplingParams::default() };
    let mut scratch = Scratch::default();
    let mut choose = |narrowing| sampler(params.clone()).sample(&mut logits(), 0, narrowing, &mut scratch);
    let within = Narrowing { mask: Some(&mask), ..Narrowing::default() };
    assert_eq!(choose(within).unwrap().id, 6);
    let banned: &[&[u32]] = &[&[6]];
    assert_eq!(choose(Narrowing { banned, ..within }), Err(SampleError::NothingAllowed));
    assert_eq!(choose(Narrowing { banned, alone: true, ..within }).unwrap().id, 5, "a bias does not count");
}

#[test]
fn a_masked_choice_draws_from_the_distribution_that_is_left() {
    let mask = Mask::of((0..VOCAB as u32).filter(|id| id % 2 == 0), VOCAB);
    let params = SamplingParams { seed: 4, top_k: 12, ..SamplingParams::default() };
    let mut scratch = Scratch::default();
    for position in 0..200 {
        let mut bare = logits();
        mask.apply(&mut bare);
        let narrowing = Narrowing { mask: Some(&mask), ..Narrowing::default() };
        let chosen = sampler(params.clone()).sample(&mut logits(), position, narrowing, &mut scratch).unwrap();
        assert_eq!(chosen.id % 2, 0);
        let best = Survivors::default().best(&bare, 12).iter().any(|candidate| candidate.id == chosen.id);
        assert!(best, "top_k counts what the mask leaves");
    }
}
