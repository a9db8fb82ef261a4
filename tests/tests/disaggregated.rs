//! The main job on real processes: what comes back over HTTP, after the KV travelled from a prefill process to
//! a decode process, is what one process computes by itself, to the last bit of every log probability.

use tandem_tests::one_process::{ask, assert_computes_the_same, prompts};
use tandem_tests::processes::{Cluster, ClusterOptions, model};

const PROMPTS: usize = 200;
const CONCURRENT: usize = 32;
const MAX_PROMPT: usize = 4000;

#[test]
fn two_hundred_prompts_are_what_one_process_computes() {
    let mut options = ClusterOptions::new(&model("tiny").expect("the project's own model"));
    (options.prefill, options.decode) = (2, 2);
    // Five processes and this one share the machine's cores: silence of a second is no sign of death here.
    options.node_flags = vec!["--peer-timeout".into(), "10s".into()];
    options.router_flags = options.node_flags.clone();
    options.router_flags.extend(["--served-model-name".into(), "tiny".into()]);
    let mut cluster = Cluster::start(&options);
    let prompts = prompts(PROMPTS, MAX_PROMPT);
    let answers = ask(&cluster, &prompts, CONCURRENT);
    assert_computes_the_same(&options.model, &prompts, &answers);
    let reused: u64 = answers
        .iter()
        .map(|answer| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count"))
        .sum();
    println!("{PROMPTS} prompts equal; {reused} prompt tokens were reused");
    cluster.wait("not everything was freed", |cluster| {
        (cluster.metric("tandem_router_requests_running")? == 0.0).then_some(())
    });
}
