//! Chat templates in the styles of published ones, against what transformers' own environment (Jinja2 with
//! its settings, `tojson`, `raise_exception`) made of them; `templates/cases.json` holds both.

use serde_json::{Map, Value, json};
use std::path::Path;
use tandem_text::{ChatInput, ChatTemplate, TemplateError};

fn template(source: &str) -> ChatTemplate {
    let sources = vec![("default".to_owned(), source.to_owned())];
    ChatTemplate::new(sources, Some("<s>".into()), Some("</s>".into())).unwrap()
}

fn input(mut variables: Map<String, Value>) -> ChatInput {
    let mut take = |name: &str| variables.remove(name).filter(|value| !value.is_null());
    ChatInput {
        messages: take("messages").and_then(|value| value.as_array().cloned()).unwrap_or_default(),
        tools: take("tools"),
        documents: take("documents"),
        add_generation_prompt: take("add_generation_prompt") == Some(Value::Bool(true)),
        continue_final_message: false,
        kwargs: variables,
    }
}

fn user(content: &str) -> ChatInput {
    ChatInput { messages: vec![json!({"role": "user", "content": content})], ..ChatInput::default() }
}

#[test]
fn renders_as_transformers_does() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(dir.join("cases.json")).unwrap()).unwrap();
    for case in &cases {
        let source = std::fs::read_to_string(dir.join(case["template"].as_str().unwrap())).unwrap();
        let made = template(&source).render(&input(case["variables"].as_object().unwrap().clone()));
        match (made, &case["expected"], &case["refused"]) {
            (Ok(text), Value::String(expected), _) => assert_eq!(&text, expected, "{}", case["name"]),
            (Err(TemplateError::Refused(text)), _, Value::String(expected)) => assert_eq!(&text, expected),
            (made, ..) => panic!("{}: {made:?}", case["name"]),
        }
    }
}

#[test]
fn today_is_known() {
    let today = template("{{ strftime_now('%Y') }}").render(&user("")).unwrap();
    assert!(today.parse::<u32>().unwrap() >= 2025, "{today}");
}

#[test]
fn a_template_cannot_run_for_ever_or_fill_memory() {
    let check = |source: &str, content: &str| {
        let made = template(source).render(&user(content));
        assert!(matches!(made, Err(TemplateError::Long)), "{source}: {:?}", made.map(|text| text.len()));
    };
    check("{% for a in range(9999) %}{% for b in range(9999) %}{% set c = 1 %}{% endfor %}{% endfor %}", "");
    check("{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}", &"x".repeat(10_000));
}

#[test]
fn tools_choose_their_template() {
    let sources =
        vec![("default".to_owned(), "plain".to_owned()), ("tool_use".into(), "{{ tools|length }}".into())];
    let template = ChatTemplate::new(sources, None, None).unwrap();
    assert!(template.mentions("tools") && !template.mentions("developer"));
    assert_eq!(template.render(&user("")).unwrap(), "plain");
    let with = ChatInput { tools: Some(json!([{}, {}])), ..user("") };
    assert_eq!(template.render(&with).unwrap(), "2");
}

#[test]
fn a_broken_template_is_refused_with_its_line() {
    let sources = vec![("default".to_owned(), "fine\n{% for %}".to_owned())];
    let error = ChatTemplate::new(sources, None, None).unwrap_err().to_string();
    assert!(error.contains("default") && error.contains("line 2"), "{error}");
    assert!(ChatTemplate::new(Vec::new(), None, None).is_err());
}

#[test]
fn the_final_message_goes_on() {
    let template = template("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}");
    let mut input = user("q");
    input.messages.push(json!({"role": "assistant", "content": "It is "}));
    input.continue_final_message = true;
    assert_eq!(template.render(&input).unwrap(), "<user>q</s><assistant>It is");
}
