//! Chat templates: each ends within its budget of work, memory and output, whatever it says.
#![no_main]

use ernie_worker::chat::{ChatTemplate, Role, Turn};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: String| {
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
    let Ok(template) = ChatTemplate::new(source, &config) else { return };
    let turn = |role, content: &str| Turn { role, content: content.to_owned() };
    let turns =
        [turn(Role::System, "be kind"), turn(Role::User, "héllo\n"), turn(Role::Assistant, ""), turn(Role::User, "{{")];
    for turns in [&turns[..], &turns[1..2], &[]] {
        for generate in [true, false] {
            // a template may refuse a conversation in its own words
            let _ = template.render(turns, generate);
        }
    }
});
