//! Sliding-window attention: in some or all layers a token sees only the last places before it.
//!
//! No published ERNIE 4.5 text checkpoint uses it; derived models may. It is also the example of a component that a
//! config selects: everything that it adds is in this file.

use serde_json::Value;

use crate::model::error::LoadResult;
use crate::model::json::Fields;

/// The longest window, in tokens.
const MAX_WINDOW: u64 = 1 << 24;

/// Which layers see how far back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SlidingWindow {
    tokens: usize,
    /// Whether each layer slides.
    layers: Vec<bool>,
}

impl SlidingWindow {
    /// Reads the usual keys: `sliding_window` (tokens, the token's own place included), `use_sliding_window` (`false`
    /// switches it off) and `layer_types` (`sliding_attention` or `full_attention` for each layer; all slide without).
    pub(in crate::model) fn read(fields: &mut Fields, layers: usize) -> LoadResult<Option<Self>> {
        let enabled = fields.flag("use_sliding_window")?.unwrap_or(true);
        let tokens = fields.count("sliding_window", 1..=MAX_WINDOW)?.filter(|_| enabled);
        let kinds = match fields.take_set("layer_types") {
            None => vec![true; layers],
            Some(value) => {
                let kinds = kinds(&value).filter(|kinds| kinds.len() == layers);
                kinds.ok_or_else(|| {
                    let wanted = format!("a list of {layers} times \"full_attention\" or \"sliding_attention\"");
                    fields.unsupported("layer_types", &value, &wanted)
                })?
            }
        };
        Ok(tokens.map(|tokens| Self { tokens, layers: kinds }))
    }

    /// How many places back a layer's tokens see, their own included; `None` for all.
    pub fn of_layer(&self, layer: usize) -> Option<usize> {
        self.layers.get(layer).is_some_and(|&slides| slides).then_some(self.tokens)
    }
}

fn kinds(value: &Value) -> Option<Vec<bool>> {
    let kind = |kind: &Value| match kind.as_str()? {
        "full_attention" => Some(false),
        "sliding_attention" => Some(true),
        _ => None,
    };
    value.as_array()?.iter().map(kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> LoadResult<Option<SlidingWindow>> {
        SlidingWindow::read(&mut Fields::parse("config.json", text)?, 3)
    }

    #[test]
    fn every_layer_slides_unless_the_config_says_which() {
        let all = read(r#"{"sliding_window": 8}"#).expect("read").expect("a window");
        assert_eq!((0..4).map(|layer| all.of_layer(layer)).collect::<Vec<_>>(), [Some(8), Some(8), Some(8), None]);
        let text =
            r#"{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}"#;
        let some = read(text).expect("read").expect("a window");
        assert_eq!((0..3).map(|layer| some.of_layer(layer)).collect::<Vec<_>>(), [Some(8), None, Some(8)]);
    }

    #[test]
    fn a_window_that_is_absent_null_or_switched_off_is_none() {
        for text in ["{}", r#"{"sliding_window": null}"#, r#"{"sliding_window": 8, "use_sliding_window": false}"#] {
            assert_eq!(read(text).expect("read"), None);
        }
    }

    #[test]
    fn layer_types_of_another_length_or_kind_are_refused() {
        for list in [r#"["full_attention"]"#, r#"["full_attention", "full_attention", "linear_attention"]"#, "7"] {
            let error = read(&format!("{{\"layer_types\": {list}}}")).expect_err(list);
            assert!(error.to_string().contains("layer_types"), "{error}");
        }
    }
}
