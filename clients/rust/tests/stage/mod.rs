//! The stage of the tests: a broker and a resource server, worked by HTTP at STAGE_URL.

use std::{
    env,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Sends a request, and returns the status and the JSON of the answer.
pub async fn request(method: &str, path: &str, authorization: &str, body: &str) -> (u16, Value) {
    let url = env::var("STAGE_URL").expect("STAGE_URL: these tests run on a stage, see clients/README.md");
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).await.unwrap();
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.0\r\nAuthorization: {authorization}\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|e| panic!("{method} {path}: {e}: {body}")))
}

pub async fn get(path: &str) -> Value {
    request("GET", path, "", "").await.1
}

pub async fn post(path: &str) -> Value {
    let (status, answer) = request("POST", path, "", "").await;
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

/// How many calls of a method the broker has got.
pub async fn calls(method: &str) -> u64 {
    get("/calls").await[method].as_u64().unwrap_or(0)
}

/// Asks again until the answer is yes.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done().await {
        assert!(Instant::now() < deadline, "still not so: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
