use super::*;

/// The semantics of the 21B-A3B-Thinking template, with the Jinja that such templates use: namespaces, reversed slices,
/// Python's string methods, `tojson`, inline conditions.
const THINKING: &str = "\
{%- macro open(role) %}{{ '<|im_start|>' ~ role ~ '\\n' }}{% endmacro %}
{{- open('system') }}
{%- set own = messages[0].content ~ '\\n' if messages[0].role == 'system' else '' %}
{%- if own or system_settings %}
{{- '<system_setting>\\n' ~ (system_settings + '\\n' if system_settings else '') ~ own ~ '</system_setting>\\n\\n' }}
{%- endif %}
{{- '<global_setting>\\nthink_mode=' ~ true ~ '\\n</global_setting>' }}
{%- if tools %}
    {{- '\\n\\n<tool_list>\\n[' }}
    {%- for tool in tools %}
        {{- '{\"type\": \"function\", \"function\": ' ~ (tool.function | tojson) ~ '}' ~ (',' if not loop.last else '') }}
    {%- endfor %}
    {{- ']\\n</tool_list>' }}
{%- endif %}
{{- '<|im_end|>\\n\\n' }}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for m in messages[::-1] %}
    {%- if not ns.found and m.role == 'user' and not (m.content.startswith('<tool_output>') and m.content.endswith('</tool_output>')) %}
        {%- set ns.found = true %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- open(m.role) ~ content ~ '<|im_end|>\\n\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thoughts = m.thoughts if m.thoughts is string else '' %}
        {%- if not thoughts and '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- open('assistant') }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' ~ thoughts.strip('\\n') ~ '\\n</think>\\n' }}
        {%- endif %}
        {%- if content|length > 0 %}
            {{- '<response>\\n' ~ content ~ '\\n</response>\\n' }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>\\n' }}
        {%- endfor %}
        {{- '<|im_end|>\\n\\n' }}
    {%- elif m.role == 'tool' %}
        {{- open('tool') ~ '<tool_output>' ~ (m.content | tojson) ~ '</tool_output><|im_end|>\\n\\n' }}
    {%- endif %}
{%- endfor %}
{{- open('assistant') ~ '<think>\\n' }}
";

const SYSTEM: &str = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting>";
const END: &str = "<|im_start|>assistant\n<think>\n";

fn compile(source: &str) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::new(source.to_owned(), &serde_json::Value::Null)
}

fn thinking() -> ChatTemplate {
    compile(THINKING).expect("compiles")
}

fn says(list: &[(Role, &str)]) -> Conversation {
    Conversation::new(list.iter().map(|&(role, content)| Turn::new(role, content)).collect())
}

#[test]
fn a_thinking_prompt_opens_the_reasoning() {
    assert_eq!(
        thinking().render(&says(&[(Role::User, "Hi")])).expect("renders"),
        format!("{SYSTEM}<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n{END}")
    );
}

#[test]
fn a_system_message_becomes_a_setting() {
    assert_eq!(
        thinking().render(&says(&[(Role::System, "Be brief."), (Role::User, "Hi")])).expect("renders"),
        format!(
            "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n<global_setting>\nthink_mode=True\n\
             </global_setting><|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n{END}"
        )
    );
}

#[test]
fn tools_are_listed_as_python_writes_json() {
    let parameters = serde_json::json!({"b": 1, "a": [1.0, true, null, "ü<>", u64::MAX]});
    let tool = |name: &str, parameters| Tool { name: name.to_owned(), description: String::new(), parameters };
    let tools = vec![tool("f", Some(parameters)), Tool { description: "Asks.".to_owned(), ..tool("g", None) }];
    let text = thinking().render(&Conversation { tools, ..says(&[(Role::User, "Hi")]) }).expect("renders");
    assert_eq!(
        text,
        format!(
            "{SYSTEM}\n\n<tool_list>\n[{{\"type\": \"function\", \"function\": {{\"name\": \"f\", \"parameters\": \
             {{\"b\": 1, \"a\": [1.0, true, null, \"ü<>\", 18446744073709551615]}}}}}},{{\"type\": \"function\", \"function\": \
             {{\"name\": \"g\", \"description\": \"Asks.\"}}}}]\n</tool_list><|im_end|>\n\n<|im_start|>user\nHi\
             <|im_end|>\n\n{END}"
        )
    );
}

#[test]
fn reasoning_of_past_turns_is_dropped_and_of_running_ones_kept() {
    let past = thinking()
        .render(&says(&[(Role::User, "Hi"), (Role::Assistant, "<think>\nwhy\n</think>\n\nHello"), (Role::User, "Bye")]))
        .expect("renders");
    assert!(past.contains("<|im_start|>assistant\n<response>\nHello\n</response>\n<|im_end|>\n\n"), "{past}");
    assert!(!past.contains("why"), "{past}");

    let arguments = serde_json::json!({"city": "柏林"}).as_object().cloned().expect("an object");
    let call = ToolCall { id: "1".to_owned(), name: "f".to_owned(), arguments };
    let asks =
        Turn { reasoning_content: "look it up".to_owned(), tool_calls: vec![call], ..Turn::new(Role::Assistant, "") };
    let turns = vec![Turn::new(Role::User, "Weather?"), asks, Turn::new(Role::Tool, "sunny")];
    let running = thinking().render(&Conversation::new(turns)).expect("renders");
    assert!(
        running.contains(
            "<think>\nlook it up\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"柏林\"}}\n</tool_call>\n"
        ),
        "{running}"
    );
    assert!(running.contains("<|im_start|>tool\n<tool_output>\"sunny\"</tool_output><|im_end|>\n\n"), "{running}");
}

#[test]
fn variables_of_the_client_reach_the_template_and_never_replace_the_conversation() {
    let mut conversation = says(&[(Role::User, "Hi")]);
    conversation.variables =
        serde_json::json!({"system_settings": "Speak up.", "messages": []}).as_object().cloned().expect("an object");
    let text = thinking().render(&conversation).expect("renders");
    assert!(text.contains("<system_setting>\nSpeak up.\n</system_setting>"), "{text}");
    assert!(text.contains("user\nHi"), "{text}");
}

#[test]
fn tools_and_marks_are_found_by_trying_them() {
    let plain = compile("{% for m in messages %}{{ m.content }}{% endfor %}").expect("compiles");
    for (template, knows) in [(thinking(), true), (plain, false)] {
        assert_eq!(
            [template.shows_tools(), template.shows_tool_calls(), template.marks_parts()],
            [knows; 3],
            "{template:?}"
        );
    }
}

#[test]
fn roles_are_found_by_trying_them() {
    assert_eq!(thinking().roles(), [Role::System, Role::User, Role::Assistant, Role::Tool]);
    let plain = compile("{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}");
    assert_eq!(plain.expect("compiles").roles(), [Role::System, Role::User, Role::Assistant]);
}

#[test]
fn blocks_leave_no_lines_behind() {
    let template =
        compile("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n");
    assert_eq!(template.expect("compiles").render(&says(&[(Role::User, "a"), (Role::User, "b")])).unwrap(), "a\nb\n");
}

#[test]
fn the_tokens_of_the_tokenizer_are_variables() {
    let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true});
    let template = ChatTemplate::new("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into(), &config);
    assert_eq!(template.expect("compiles").render(&says(&[(Role::User, "x")])).unwrap(), "<s>x</s>");
}

#[test]
fn a_template_may_refuse_in_its_own_words() {
    let template = compile(
        "{% if messages|length > 2 %}{{ raise_exception('at most two messages') }}{% endif %}{{ messages[0].content }}",
    )
    .expect("compiles");
    let error = template.render(&says(&[(Role::User, "a"), (Role::User, "b"), (Role::User, "c")])).unwrap_err();
    assert_eq!(error.to_string(), "the chat template refuses the conversation: at most two messages");
}

#[test]
fn a_template_that_is_none_is_refused_with_its_line() {
    let error = compile("{{ messages[0].content }}\n{% if %}").unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja, line 2"), "{error}");
    let error = compile("no message").unwrap_err().to_string();
    assert!(error.contains("without its content"), "{error}");
}

#[test]
fn pathological_templates_run_out_of_fuel() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ messages[0].content * 1000000000 }}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ range(100000)|list|tojson * 1000 }}",
    ] {
        let error = compile(source).unwrap_err();
        assert!(matches!(error, ChatError::Template(_)), "{error}");
    }
}

#[test]
fn floats_are_written_as_python_writes_them() {
    let template =
        compile("{{ messages[0].content }}{{ [1.0, 1e16, 0.00001, -2.5e-7, 0.1] | tojson }}").expect("compiles");
    assert_eq!(template.render(&says(&[(Role::User, "")])).unwrap(), "[1.0, 1e+16, 1e-05, -2.5e-07, 0.1]");
}

#[test]
fn templates_that_are_too_long_or_no_file_are_refused() {
    let long = compile(&format!("{{{{ messages[0].content }}}}{}", " ".repeat(MAX_TEMPLATE))).unwrap_err();
    assert!(long.to_string().contains("256 KiB"), "{long}");
    for name in [NAME, "tokenizer_config.json"] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        let file = fs::File::create(&path).expect("made");
        file.set_len(MAX_FILE + 1).expect("grown");
        let error = ChatTemplate::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("4 MiB"), "{error}");
        fs::remove_file(&path).expect("removed");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("made");
        let error = ChatTemplate::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
    }
}
