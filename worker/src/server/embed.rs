//! `Embed`: texts to vectors.

use ernie_proto::ernie::v1::{self, embed_input::Input};
use tonic::Status;

use super::{
    arrival::off_the_async_threads,
    entry::{Call, Entry},
    prompt::encode,
    reading::{read_all, usage},
    request::check_ids,
    served::Served,
    status::invalid,
};
use crate::engine::{Pooling, PromptOutput};

/// Most inputs of one call.
const MAX_INPUTS: usize = 256;
/// Most bytes of embeddings in one answer; clients take messages of 4 MiB unless told otherwise.
const MAX_BYTES: usize = 3 << 20;

/// What a client asks for, beside the inputs.
pub(super) struct Form {
    /// Number of [`v1::Pooling`].
    pub(super) pooling: i32,
    pub(super) normalize: Option<bool>,
    pub(super) dimensions: Option<u32>,
}

/// The same, checked.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    pooling: Pooling,
    normalize: bool,
    /// Numbers of an embedding that are kept.
    width: usize,
}

/// Answers a request.
pub(super) async fn embed(
    entry: Entry,
    call: Call,
    inputs: Vec<v1::EmbedInput>,
    form: Form,
) -> Result<v1::EmbedResponse, Status> {
    let Entry { served, caller, model, numerics } = entry;
    let shape = shape(&form, inputs.len(), served.engine.limits().hidden)?;
    let work = {
        let served = std::sync::Arc::clone(&served);
        move || prompts(&served, inputs)
    };
    let prompts = off_the_async_threads(&served.text, call.arrival, work).await?;
    call.taken.set();
    let asked = prompts.into_iter().map(|ids| (ids, PromptOutput::Embedding(shape.pooling))).collect();
    let told = read_all(&served, &caller, asked).await?;
    Ok(v1::EmbedResponse {
        request_id: caller.request_id,
        model,
        numerics,
        usage: Some(usage(&told)),
        embeddings: told.into_iter().map(|told| v1::Embedding { values: shaped(told.embedding, shape) }).collect(),
    })
}

fn shape(form: &Form, inputs: usize, hidden: usize) -> Result<Shape, Status> {
    let Form { pooling, normalize, dimensions } = *form;
    let pooling = match v1::Pooling::try_from(pooling) {
        Ok(v1::Pooling::Unspecified | v1::Pooling::Last) => Pooling::Last,
        Ok(v1::Pooling::Mean) => Pooling::Mean,
        Err(_) => {
            let sentence = format!("is {pooling}, which is no pooling of this API; set one of Pooling's values");
            return Err(invalid("pooling", sentence));
        }
    };
    let width = match dimensions {
        None => hidden,
        Some(width) if (1..=hidden).contains(&(width as usize)) => width as usize,
        Some(width) => {
            return Err(invalid("dimensions", format!("is {width}; choose from 1 to {hidden}, or leave it out")));
        }
    };
    let most = (MAX_BYTES / (4 * width)).clamp(1, MAX_INPUTS);
    if !(1..=most).contains(&inputs) {
        return Err(invalid("inputs", format!("has {inputs} inputs; send 1 to {most}")));
    }
    Ok(Shape { pooling, normalize: normalize.unwrap_or(true), width })
}

fn prompts(served: &Served, inputs: Vec<v1::EmbedInput>) -> Result<Vec<Vec<u32>>, Status> {
    let (context, vocab) = (served.engine.limits().context, served.engine.limits().vocab);
    let prompt = |(index, input): (usize, v1::EmbedInput)| {
        let field = format!("inputs[{index}]");
        let ids = match input.input {
            Some(Input::Text(text)) => encode(served, &text, None, &format!("{field}.text"))?,
            Some(Input::Tokens(v1::TokenIds { ids })) => {
                check_ids(&ids, &format!("{field}.tokens.ids"), vocab)?;
                ids
            }
            None => return Err(invalid(&field, "is missing; set text or tokens")),
        };
        match ids.len() {
            0 => Err(invalid(&field, "has no token; send at least one")),
            tokens if tokens > context => Err(invalid(&field, format!("has {tokens} tokens; send at most {context}"))),
            _ => Ok(ids),
        }
    };
    inputs.into_iter().enumerate().map(prompt).collect()
}

/// Cuts an embedding, and scales it.
fn shaped(mut embedding: Vec<f32>, shape: Shape) -> Vec<f32> {
    embedding.truncate(shape.width);
    if shape.normalize {
        let square: f64 = embedding.iter().map(|&number| f64::from(number) * f64::from(number)).sum();
        let length = square.sqrt();
        if length > 0.0 {
            embedding.iter_mut().for_each(|number| *number = (f64::from(*number) / length) as f32);
        }
    }
    embedding
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};

    fn form() -> Form {
        Form { pooling: 0, normalize: None, dimensions: None }
    }

    #[test]
    fn absent_fields_mean_the_last_token_scaled_and_whole() {
        let expected = Shape { pooling: Pooling::Last, normalize: true, width: 8 };
        assert_eq!(shape(&form(), 1, 8).expect("valid"), expected);
        let given = Form { pooling: 2, normalize: Some(false), dimensions: Some(8) };
        let expected = Shape { pooling: Pooling::Mean, normalize: false, width: 8 };
        assert_eq!(shape(&given, 256, 8).expect("valid"), expected);
    }

    #[test]
    fn a_form_without_sense_is_refused_by_field_value_and_remedy() {
        let pooling = refused(shape(&Form { pooling: 7, ..form() }, 1, 8));
        assert!(pooling.starts_with("pooling: is 7, which is no pooling"), "{pooling}");
        for (dimensions, sentence) in [(0, "dimensions: is 0; choose from 1 to 8"), (9, "dimensions: is 9; choose")] {
            let refused = refused(shape(&Form { dimensions: Some(dimensions), ..form() }, 1, 8));
            assert!(refused.starts_with(sentence), "{refused}");
        }
        assert_eq!(refused(shape(&form(), 0, 8)), "inputs: has 0 inputs; send 1 to 256");
        assert_eq!(refused(shape(&form(), 257, 8)), "inputs: has 257 inputs; send 1 to 256");
        assert_eq!(refused(shape(&form(), 97, 8192)), "inputs: has 97 inputs; send 1 to 96");
    }

    #[test]
    fn an_embedding_is_cut_before_it_is_scaled_and_a_zero_stays_zero() {
        let form = Shape { pooling: Pooling::Last, normalize: true, width: 2 };
        assert_eq!(shaped(vec![3.0, -4.0, 100.0], form), [0.6, -0.8]);
        assert_eq!(shaped(vec![0.0; 3], form), [0.0, 0.0]);
        assert_eq!(shaped(vec![3.0, -4.0, 5.0], Shape { normalize: false, ..form }), [3.0, -4.0]);
    }
}
