//! Adapters, asked for by name.

use std::path::{Path, PathBuf};

use ernie_proto::{ernie::v1::GetModelRequest, failure::Reason};
use ernie_worker::{
    eval::evaluate::{Rows, Sequence, Settings, evaluate},
    model::{self, Checkpoint, KvSize, LoadOptions},
    serve::Worker,
    server::connection::ConnectionLimits,
};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;
use tonic::Code;

use super::running::{Running, args, complete_ids, greedy, model, read, within};

/// Hidden and inner width of the demo model.
pub const WIDTHS: (usize, usize) = (192, 512);
const RANK: usize = 2;

/// An adapter of the demo model that changes what it says: a PEFT folder with one pair, filled from `seed`.
pub fn folder(seed: f32, inputs: usize) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = serde_json::json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 8}).to_string();
    std::fs::write(folder.path().join("adapter_config.json"), config).expect("written");
    let numbers = |count: usize| -> Vec<u8> {
        (0..count).flat_map(|place| (0.5 * (seed * (place + 1) as f32).sin()).to_le_bytes()).collect()
    };
    let (a, b) = (numbers(RANK * inputs), numbers(WIDTHS.0 * RANK));
    let name = |letter: &str| format!("base_model.model.model.layers.1.mlp.down_proj.lora_{letter}.weight");
    let tensor = |shape: Vec<usize>, bytes| TensorView::new(Dtype::F32, shape, bytes).expect("a tensor");
    let tensors = [(name("A"), tensor(vec![RANK, inputs], &a)), (name("B"), tensor(vec![WIDTHS.0, RANK], &b))];
    safetensors::serialize_to_file(tensors, None, &folder.path().join("adapter_model.safetensors")).expect("written");
    folder
}

pub fn flag(name: &str, folder: &Path) -> String {
    format!("{name}={}", folder.display())
}

/// What the model says greedily after a prompt, computed without a server.
fn expected(prompt: &[u32], adapter: Option<PathBuf>) -> Vec<u32> {
    let options = LoadOptions {
        threads: 2,
        kv: KvSize::Blocks(16),
        max_model_len: Some(512),
        adapters: adapter.map(|path| ("it".to_owned(), path)).into_iter().collect(),
        ..LoadOptions::default()
    };
    let settings =
        Settings { generate: 24, rows: Rows::Last, adapter: !options.adapters.is_empty(), ..Settings::default() };
    let checkpoint = Checkpoint::inspect(&model()).expect("a checkpoint");
    let mut executor = model::load(&checkpoint, &options, &|_| {}).expect("loaded");
    let sequence = Sequence { ids: prompt.to_vec(), positions: None };
    evaluate(&mut executor, &[sequence], &settings).expect("evaluated").remove(0).greedy_tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn each_model_name_gets_its_own_adapter_and_none_finds_the_other_s_cached_prompt() {
    let (loud, soft) = (folder(0.7, WIDTHS.1), folder(1.3, WIDTHS.1));
    let worker =
        Running::start(&["--adapter", &flag("loud", loud.path()), "--adapter", &flag("soft", soft.path())]).await;
    let client = worker.client().await;
    // long enough for two blocks in the prefix cache
    let prompt: Vec<u32> = std::iter::once(1).chain((0..80).map(|place| 300 + 7 * place % 90)).collect();
    let wanted = [
        ("", expected(&prompt, None)),
        ("loud", expected(&prompt, Some(loud.path().to_owned()))),
        ("soft", expected(&prompt, Some(soft.path().to_owned()))),
    ];
    assert!(wanted[0].1 != wanted[1].1 && wanted[1].1 != wanted[2].1, "the adapters change nothing");
    let mut sampling = greedy(24);
    sampling.ignore_eos = true;
    for cached in [0, 64] {
        let calls = wanted.iter().map(|(name, tokens)| {
            let mut request = complete_ids(&prompt, sampling.clone());
            request.model = (*name).to_owned();
            let mut client = client.clone();
            async move {
                let stream = within(client.complete(request)).await.expect("accepted").into_inner();
                (*name, tokens, read(stream).await.expect("an answer"))
            }
        });
        let mut numerics = Vec::new();
        for (name, tokens, answer) in futures::future::join_all(calls).await {
            assert_eq!(&answer.ids(), tokens, "{name:?}");
            assert_eq!(answer.started.model, if name.is_empty() { "austen-2.6m" } else { name });
            assert_eq!(answer.done.usage.expect("usage").cached_tokens, cached, "{name:?}");
            numerics.push(answer.started.numerics);
        }
        numerics.sort_unstable();
        numerics.dedup();
        assert_eq!(numerics.len(), 3, "answers that may differ have different identities");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_adapters_are_models_and_other_names_are_not_found() {
    let loud = folder(0.7, WIDTHS.1);
    let worker = Running::start(&["--adapter", &flag("loud", loud.path())]).await;
    let mut client = worker.client().await;
    let found = within(client.get_model(GetModelRequest { model: "loud".to_owned() })).await.expect("found");
    assert_eq!(found.get_ref().name, "loud");
    assert_eq!(found.get_ref().adapters, ["loud"]);
    let other = within(client.get_model(GetModelRequest { model: "Loud".to_owned() })).await.expect_err("not found");
    assert_eq!(other.code(), Code::NotFound);
    assert!(other.message().contains("\"austen-2.6m\", \"loud\""), "{other}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_an_adapter_of_another_model_gives_up_with_the_tensor_s_name() {
    let wrong = folder(0.7, 64);
    let flags = ["--adapter", &flag("loud", wrong.path())];
    let worker = Worker::bind(args(&model(), &flags), ConnectionLimits::default()).await.expect("binds");
    let failure = Running::run(worker).end().await.expect_err("refused");
    assert_eq!(failure.reason, Reason::CorruptModel);
    assert!(failure.message.contains("layers.1.mlp.down_proj.lora_A"), "{}", failure.message);
}
