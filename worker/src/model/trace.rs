//! What a forward pass leaves on the way, for comparison with a reference.

use std::ops::Range;

use super::backend::{Backend, Result, Routes};

/// Intermediate results, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Rows that were traced.
    pub count: usize,
    /// `embed`, `layer.N` and `norm`, `[rows, hidden]`.
    pub activations: Vec<(String, Vec<f32>)>,
    /// The routers' doings by layer.
    pub routers: Vec<RouterTrace>,
}

/// What a layer's router did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterTrace {
    /// The layer.
    pub layer: usize,
    /// Scores before the softmax `[rows, experts]`.
    pub logits: Vec<f32>,
    /// The choices.
    pub routes: Routes,
}

impl Trace {
    /// Some rows of a trace of one step with `of` rows.
    pub fn rows(&self, range: Range<usize>, of: usize) -> Trace {
        fn cut<T: Clone>(values: &[T], range: &Range<usize>, of: usize) -> Vec<T> {
            let width = values.len() / of;
            values[range.start * width..range.end * width].to_vec()
        }
        let router = |router: &RouterTrace| RouterTrace {
            layer: router.layer,
            logits: cut(&router.logits, &range, of),
            routes: Routes {
                active: router.routes.active,
                index: cut(&router.routes.index, &range, of),
                weight: cut(&router.routes.weight, &range, of),
            },
        };
        Trace {
            count: range.len(),
            activations: self.activations.iter().map(|(name, rows)| (name.clone(), cut(rows, &range, of))).collect(),
            routers: self.routers.iter().map(router).collect(),
        }
    }

    /// Adds the rows of a later step below these.
    pub fn append(&mut self, later: Trace) {
        self.count += later.count;
        for (name, rows) in later.activations {
            match self.activations.iter_mut().find(|(known, _)| *known == name) {
                Some((_, kept)) => kept.extend(rows),
                None => self.activations.push((name, rows)),
            }
        }
        for router in later.routers {
            match self.routers.iter_mut().find(|known| known.layer == router.layer) {
                Some(known) => {
                    known.logits.extend(router.logits);
                    known.routes.index.extend(router.routes.index);
                    known.routes.weight.extend(router.routes.weight);
                }
                None => self.routers.push(router),
            }
        }
    }

    /// Keeps activations, when somebody traces.
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError) when the backend cannot give them.
    pub(super) fn record<B: Backend>(
        trace: &mut Option<&mut Trace>,
        backend: &B,
        name: &str,
        rows: &B::Rows,
    ) -> Result<()> {
        let Some(trace) = trace else { return Ok(()) };
        trace.activations.push((name.to_owned(), backend.into_f32(rows.clone())?));
        Ok(())
    }

    /// Keeps a router's scores and choices.
    pub(super) fn record_routes(&mut self, layer: usize, logits: Vec<f32>, routes: &Routes) {
        self.routers.push(RouterTrace { layer, logits, routes: routes.clone() });
    }
}
