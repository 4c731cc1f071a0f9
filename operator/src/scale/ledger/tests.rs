//! What a ledger keeps and tells, decision by decision.

use serde_json::{Value, json};

use super::*;
use crate::scale::observation::{Replica, Sample, State};

fn spec(fields: Value) -> Autoscaling {
    let mut value = json!({"maxReplicas": 8});
    for (name, field) in fields.as_object().into_iter().flatten() {
        value[name] = field.clone();
    }
    serde_json::from_value(value).expect("autoscaling")
}

fn at(seconds: f64) -> Moment {
    Moment::from_seconds(1.7e9 + seconds)
}

/// One worker that has served so many requests by now.
fn served(requests: f64, seconds: f64) -> Observation {
    let sample = Sample {
        at: at(seconds),
        accepted: requests,
        finished: requests,
        prompt_tokens: 100.0 * requests,
        output_tokens: 20.0 * requests,
        ..Sample::default()
    };
    let replica =
        Replica { id: 1, state: State::Ready, created: at(-900.0), ready: Some(at(-800.0)), sample: Some(sample) };
    Observation { replicas: vec![replica], ..Observation::default() }
}

/// So many ticks at so many requests per second; the last finding.
fn ticks(ledger: &mut Ledger, spec: &Autoscaling, from: usize, count: usize, rate: f64) -> Finding {
    let mut last = None;
    for tick in from..from + count {
        let seconds = 5.0 * tick as f64;
        last = Some(ledger.decide(spec, served(rate * seconds, seconds), &[], at(seconds)));
    }
    last.expect("at least one tick")
}

#[test]
fn a_decision_changes_the_number_once_and_is_recorded_with_its_numbers() {
    let spec = spec(json!({}));
    let mut ledger = Ledger::open(None, 1);
    let before = ticks(&mut ledger, &spec, 0, 3, 1.0);
    assert_eq!((before.status.desired_replicas, before.status.decisions.len()), (1, 0));
    let after = ticks(&mut ledger, &spec, 3, 20, 500.0);
    assert!(after.status.desired_replicas > 1);
    let decision = after.status.decisions.last().expect("recorded");
    assert_eq!(
        (decision.to, Some(&decision.time)),
        (after.status.desired_replicas, after.status.last_scale_time.as_ref())
    );
    assert!(decision.message.contains("work arrives"), "{}", decision.message);
    assert!(after.status.decisions.len() <= DECISIONS);
}

#[test]
fn advice_is_recorded_when_it_changes_and_not_followed() {
    let spec = spec(json!({"advisory": true}));
    let mut ledger = Ledger::open(None, 1);
    let finding = ticks(&mut ledger, &spec, 0, 40, 500.0);
    assert_eq!((finding.status.desired_replicas, finding.active.reason), (1, "Advisory"));
    assert_eq!(finding.status.last_scale_time, None);
    let wishes: Vec<i32> = finding.status.decisions.iter().map(|decision| decision.to).collect();
    assert!(!wishes.is_empty() && wishes.windows(2).all(|pair| pair[0] != pair[1]), "{wishes:?}");
    assert!(finding.status.decisions.iter().all(|decision| decision.from == 1));
}

#[test]
fn advice_that_goes_up_and_down_with_the_load_is_told_once_in_a_down_window() {
    let spec = spec(json!({"advisory": true}));
    let mut ledger = Ledger::open(None, 1);
    let (mut told, mut requests) = (0, 0.0);
    let mut last = ledger.decide(&spec, served(0.0, 0.0), &[], at(0.0));
    for tick in 1..200 {
        let seconds = 5.0 * f64::from(tick);
        requests += if tick / 20 % 2 == 0 { 500.0 } else { 2500.0 };
        let finding = ledger.decide(&spec, served(requests, seconds), &[], at(seconds));
        told += u32::from((&finding.status.decisions, &finding.active) != (&last.status.decisions, &last.active));
        last = finding;
    }
    assert!((1..=16).contains(&told), "{told}");
}

#[test]
fn what_was_learnt_is_written_at_first_when_it_changed_and_every_five_minutes_under_load() {
    let spec = spec(json!({}));
    let mut ledger = Ledger::open(None, 1);
    let (mut texts, mut last) = (Vec::new(), None);
    for tick in 0..400 {
        let text = ticks(&mut ledger, &spec, tick, 1, 2.0).status.history;
        if text != last {
            texts.push(tick);
            last = text;
        }
    }
    assert_eq!(texts[0], 0);
    assert!(texts.windows(2).all(|pair| (6..=60).contains(&(pair[1] - pair[0]))), "30 s to 5 min: {texts:?}");
    assert!(texts.len() < 16, "{texts:?}");
    assert!(last.is_some_and(|text| text.len() <= PERSISTED_BYTES));

    let mut idle = Ledger::open(None, 1);
    let first = ticks(&mut idle, &spec, 0, 1, 0.0).status;
    assert_eq!(ticks(&mut idle, &spec, 1, 200, 0.0).status, first, "an idle model has nothing to write");
}

#[test]
fn a_successor_goes_on_from_the_status() {
    let spec = spec(json!({}));
    let mut ledger = Ledger::open(None, 1);
    let before = ticks(&mut ledger, &spec, 0, 60, 500.0).status;
    let mut successor = Ledger::open(Some(&before), before.desired_replicas);
    let after = ticks(&mut successor, &spec, 60, 1, 500.0).status;
    assert_eq!((after.desired_replicas, &after.decisions), (before.desired_replicas, &before.decisions));
    let garbled = AutoscalingStatus { history: Some("{".to_owned()), ..before.clone() };
    let after = ticks(&mut Ledger::open(Some(&garbled), 5), &spec, 60, 1, 0.0).status;
    assert_eq!(after.desired_replicas, 5, "who knows nothing gives nothing up");
}

#[test]
fn missing_metrics_are_told_with_the_workers_and_the_cause() {
    let spec = spec(json!({}));
    let mut silent = served(0.0, 0.0);
    silent.replicas[0].sample = None;
    let causes: Vec<(String, String)> = (0..5).map(|i| (format!("m-{i}"), "no answer".to_owned())).collect();
    let finding = Ledger::open(None, 3).decide(&spec, silent.clone(), &causes, at(0.0));
    assert_eq!((finding.active.status, finding.active.reason), (Some(false), "MetricsMissing"));
    assert!(finding.active.message.contains("m-0: no answer; m-1: no answer; m-2: no answer; and 2 more"));
    assert_eq!(finding.status.desired_replicas, 3);
    silent.replicas[0].state = State::Starting;
    let finding = Ledger::open(None, 3).decide(&spec, silent, &[], at(0.0));
    assert_eq!((finding.active.status, finding.active.reason), (None, "MetricsMissing"));
}

#[test]
fn a_spec_that_cannot_be_followed_stops_decisions_until_it_is_another() {
    let bad = spec(json!({"schedules": [{"schedule": "x x x x x", "duration": "1h", "minReplicas": 2}]}));
    let mut ledger = Ledger::open(None, 2);
    let finding = ledger.decide(&bad, served(0.0, 0.0), &[], at(0.0));
    assert_eq!((finding.active.status, finding.active.reason), (Some(false), "InvalidSchedule"));
    assert!(
        finding.active.message.contains("\"x x x x x\"")
            && finding.active.message.ends_with("2 replicas stay until then")
    );
    let finding = ledger.decide(&spec(json!({})), served(0.0, 5.0), &[], at(5.0));
    assert_eq!((finding.active.status, finding.active.reason), (Some(true), "FreshData"));
}

#[test]
fn times_in_sentences_keep_one_digit() {
    for (seconds, text) in [(0.01634, "20 ms"), (2.4, "2 s"), (0.00047, "500 us"), (1e-9, "1 ns"), (95.0, "100 s")] {
        assert_eq!(rough(seconds), text);
    }
    assert_eq!((exact(3.0), exact(0.1), exact(1.5)), ("3 s".to_owned(), "100 ms".to_owned(), "1.5 s".to_owned()));
}
