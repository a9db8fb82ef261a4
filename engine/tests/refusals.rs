//! What cannot be run is refused when it is loaded, and the error names the field or tensor and its value.

mod folders;

use folders::Folder;
use serde_json::{Map, Value, json};
use tandem_engine::Engine;

/// Loads a fixture with a changed `config.json`; the error must contain all of `expected`.
fn refused(fixture: &str, change: impl FnOnce(&mut Map<String, Value>), expected: &[&str]) {
    let folder = Folder::copy_of(fixture);
    folder.edit("config.json", change);
    expect(&folder, expected);
}

fn expect(folder: &Folder, expected: &[&str]) {
    let error = folder.load().err().unwrap_or_else(|| panic!("loaded, expected {expected:?}")).to_string();
    for part in expected {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn configurations() {
    // The field, a value that cannot be, and what the error says beside the field.
    let table = [
        ("architectures", json!(["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        ("architectures", json!(["MixtralForCausalLM"]), "MistralForCausalLM"),
        ("architectures", json!([]), "LlamaForCausalLM"),
        ("architectures", json!("LlamaForCausalLM"), "one of"),
        ("architectures", Value::Null, "one of"),
        ("hidden_act", json!("gelu"), "silu"),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        ("num_experts", json!(8), "8"),
        ("num_local_experts", json!(8), "8"),
        ("partial_rotary_factor", json!(0.5), "0.5"),
        ("attn_logit_softcapping", json!(30.0), "30"),
        ("hidden_size", Value::Null, "missing"),
        ("hidden_size", json!(-1), "-1"),
        ("hidden_size", json!(1u64 << 40), "1099511627776"),
        ("hidden_size", json!("many"), "many"),
        ("num_hidden_layers", json!(0), "0"),
        ("num_hidden_layers", json!(5000), "5000"),
        ("num_attention_heads", json!(1.5), "1.5"),
        ("num_key_value_heads", json!(3), "3"),
        ("head_dim", json!(7), "7"),
        ("vocab_size", json!(0), "0"),
        ("max_position_embeddings", Value::Null, "missing"),
        ("rms_norm_eps", json!(-1.0), "-1"),
        ("tie_word_embeddings", json!("yes"), "yes"),
        ("eos_token_id", json!(100_000), "100000"),
        ("eos_token_id", json!([1, "2"]), "tokens below"),
    ];
    for (field, value, said) in table {
        refused("llama2", |config| drop(config.insert(field.to_owned(), value)), &[field, said]);
    }
}

#[test]
fn rope() {
    let table = [
        (json!({"rope_type": "dynamic", "factor": 2.0}), "rope_scaling.rope_type", "dynamic"),
        (json!({"type": "longrope", "factor": 2.0}), "rope_scaling.rope_type", "longrope"),
        (json!({"factor": 2.0}), "rope_scaling.rope_type", "missing"),
        (json!({"type": "linear"}), "rope_scaling.factor", "missing"),
        (json!({"type": "linear", "factor": 0.0}), "rope_scaling.factor", "0"),
        (json!({"type": "linear", "factor": "4"}), "rope_scaling.factor", "4"),
        (json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor", "missing"),
        (json!({"full_attention": {"rope_type": "default"}}), "rope_scaling.full_attention", "object"),
        (json!("linear"), "rope_scaling", "linear"),
    ];
    for (value, field, said) in table {
        let change = |config: &mut Map<String, Value>| {
            config.remove("rope_parameters");
            config.insert("rope_scaling".to_owned(), value);
        };
        refused("llama2", change, &[field, said]);
    }
    let theta = |config: &mut Map<String, Value>| {
        config.remove("rope_parameters");
        config.insert("rope_theta".to_owned(), json!(-3));
    };
    refused("llama2", theta, &["rope_theta", "-3"]);
}

#[test]
fn layers() {
    let set =
        |types: Value| |config: &mut Map<String, Value>| drop(config.insert("layer_types".to_owned(), types));
    refused("qwen2-window", set(json!(["full_attention"])), &["layer_types", "3 layers"]);
    let linear = json!(["full_attention", "linear_attention", "full_attention"]);
    refused("qwen2-window", set(linear), &["layer_types", "linear_attention"]);
    let off =
        |config: &mut Map<String, Value>| drop(config.insert("use_sliding_window".to_owned(), json!(false)));
    refused("qwen2-window", off, &["sliding_window"]);
    let none = |config: &mut Map<String, Value>| drop(config.remove("num_key_value_heads"));
    refused("mistral-window", none, &["num_key_value_heads", "missing"]);
}

#[test]
fn tensors() {
    let set = |field: &'static str, value: Value| {
        move |config: &mut Map<String, Value>| drop(config.insert(field.to_owned(), value))
    };
    // The configuration and the weights must agree.
    refused("llama2", set("vocab_size", json!(97)), &["model.embed_tokens.weight", "97"]);
    refused("llama2", set("intermediate_size", json!(8)), &["mlp.gate_proj.weight", "8"]);
    refused("llama2", set("attention_bias", json!(true)), &["q_proj.bias", "missing"]);
    refused("llama2", set("num_hidden_layers", json!(1)), &["model.layers.1.", "no place"]);
    refused("llama-bias", set("attention_bias", json!(false)), &["_proj.bias", "no place"]);
    refused("qwen3-sharded", set("architectures", json!(["Qwen2ForCausalLM"])), &["q_proj.bias", "missing"]);

    // A tensor with another dtype.
    let folder = Folder::copy_of("llama2");
    let bytes = folder.read("model.safetensors");
    let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
    let at = 8 + text.find("\"F32\"").expect("an F32 tensor");
    let mut changed = bytes.clone();
    changed[at + 1..at + 4].copy_from_slice(b"I32");
    folder.write("model.safetensors", &changed);
    expect(&folder, &["I32", "F32, F16, BF16"]);
}

#[test]
fn files() {
    let folder = Folder::copy_of("llama2");
    std::fs::remove_file(folder.path("model.safetensors")).unwrap();
    expect(&folder, &["neither model.safetensors nor"]);
    std::fs::remove_file(folder.path("config.json")).unwrap();
    expect(&folder, &["config.json", "cannot read"]);
    folder.write("config.json", b"[1, 2]");
    expect(&folder, &["config.json", "not a JSON object"]);
    folder.write("config.json", b"{\"a\": ");
    expect(&folder, &["config.json", "malformed"]);

    // An index that leads out of the folder, or to what is not there.
    let names = [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "..",
        "config.json",
        "",
        "./x.safetensors",
    ];
    for name in names {
        let folder = Folder::copy_of("qwen3-sharded");
        folder.edit("model.safetensors.index.json", |index| {
            index["weight_map"]["model.norm.weight"] = json!(name);
        });
        expect(&folder, &["model.norm.weight", "not a file name"]);
    }
    let folder = Folder::copy_of("qwen3-sharded");
    folder.edit("model.safetensors.index.json", |index| {
        index["weight_map"]["model.norm.weight"] = json!("model-00003-of-00002.safetensors");
    });
    expect(&folder, &["model-00003-of-00002.safetensors", "cannot read"]);
    let folder = Folder::copy_of("qwen3-sharded");
    let shard = folder.read("model-00001-of-00002.safetensors");
    folder.write("model-00002-of-00002.safetensors", &shard);
    expect(&folder, &["is in another file too"]);
    let folder = Folder::copy_of("qwen3-sharded");
    folder
        .edit("model.safetensors.index.json", |index| drop(index.insert("weight_map".to_owned(), json!(3))));
    expect(&folder, &["weight_map"]);
}

#[test]
fn special_tokens_are_read_from_generation_config() {
    let folder = Folder::copy_of("llama2");
    let before = folder.load().unwrap().info().fingerprint;
    let text = r#"{"eos_token_id": [7, 9], "bos_token_id": 3, "temperature": 0.6}"#;
    folder.write("generation_config.json", text.as_bytes());
    let engine = folder.load().unwrap();
    let info = engine.info();
    assert_eq!(info.eos.iter().map(|t| t.0).collect::<Vec<_>>(), [7, 9]);
    assert_eq!(info.bos.map(|t| t.0), Some(3));
    assert_eq!(info.fingerprint, before, "special tokens change no KV");
    folder.write("generation_config.json", br#"{"eos_token_id": "end"}"#);
    expect(&folder, &["eos_token_id", "end"]);
}

#[test]
fn what_changes_kv_changes_the_fingerprint() {
    let folder = Folder::copy_of("llama2");
    let before = folder.load().unwrap().info().fingerprint;
    folder.edit("config.json", |config| drop(config.insert("rms_norm_eps".to_owned(), json!(1e-3))));
    assert_ne!(folder.load().unwrap().info().fingerprint, before);
    let folder = Folder::copy_of("llama2");
    let mut bytes = folder.read("model.safetensors");
    *bytes.last_mut().unwrap() ^= 1;
    folder.write("model.safetensors", &bytes);
    assert_ne!(folder.load().unwrap().info().fingerprint, before);
}
