//! What the source does at a broker that has no WatchToken yet, or ends it with a denial: one of the tests' own, that speaks HTTP/2 by hand.

use std::{
    fs, process,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::{BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, Response};
use prost::Message;
use token_broker_client::{Config, TokenSource};
use tokio::net::TcpListener;

/// As much of the schema as an answer needs.
#[derive(Clone, PartialEq, Message)]
struct Token {
    #[prost(string, tag = "1")]
    access_token: String,
    #[prost(string, tag = "2")]
    token_type: String,
    #[prost(message, tag = "3")]
    expire_time: Option<prost_types::Timestamp>,
    #[prost(message, tag = "4")]
    refresh_time: Option<prost_types::Timestamp>,
    #[prost(message, tag = "5")]
    issue_time: Option<prost_types::Timestamp>,
    #[prost(string, tag = "7")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct IssueTokenResponse {
    #[prost(message, tag = "1")]
    token: Option<Token>,
}

/// The calls that the broker got: method and authorization.
type Calls = Arc<Mutex<Vec<(String, String)>>>;

/// Streams that stay open.
type Open = Arc<Mutex<Vec<h2::SendStream<Bytes>>>>;

async fn serve(listener: TcpListener, calls: Calls, denies: bool) {
    let open = Open::default();
    while let Ok((stream, _)) = listener.accept().await {
        let (calls, open) = (calls.clone(), open.clone());
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
                let shown = request.headers().get("authorization").map(|v| v.to_str().unwrap().to_owned());
                let n = {
                    let mut calls = calls.lock().unwrap();
                    calls.push((method.clone(), shown.unwrap_or_default()));
                    calls.len()
                };
                let head = Response::builder().header("content-type", "application/grpc");
                if method != "IssueToken" && !denies {
                    respond.send_response(head.header("grpc-status", "12").body(()).unwrap(), true).unwrap();
                    continue;
                }
                let after = |seconds| Some(prost_types::Timestamp::from(SystemTime::now() + Duration::from_secs(seconds)));
                let token = Some(Token {
                    access_token: format!("token {n}"),
                    token_type: "Bearer".into(),
                    issue_time: after(0),
                    refresh_time: after(if denies && n > 1 { 1800 } else { 1 }),
                    expire_time: after(3600),
                    id: format!("{n}"),
                });
                let message = IssueTokenResponse { token }.encode_to_vec();
                let mut frame = vec![0];
                frame.put_u32(message.len() as u32);
                frame.extend(message);
                let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
                body.send_data(Bytes::from(frame), false).unwrap();
                if denies && n > 1 {
                    open.lock().unwrap().push(body);
                    continue;
                }
                let status = HeaderValue::from_static(if denies { "7" } else { "0" });
                let status = (HeaderName::from_static("grpc-status"), status);
                body.send_trailers(HeaderMap::from_iter([status])).unwrap();
            }
        });
    }
}

#[tokio::test]
async fn the_token_is_issued_and_issued_again_when_that_is_due() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let file = std::env::temp_dir().join(format!("token-broker-client-{}", process::id()));
    fs::write(&file, "first\n").unwrap();
    let config = Config {
        address: listener.local_addr().unwrap().to_string(),
        ca: None,
        certificate: None,
        private_key: None,
        token_file: Some(file.clone()),
        ..Config::new("invoices")
    };
    let calls = Calls::default();
    tokio::spawn(serve(listener, calls.clone(), false));
    let source = TokenSource::new(config).unwrap();
    let first = source.token().await.unwrap();
    assert_eq!(first.access_token(), "token 2");
    fs::write(&file, "second").unwrap();
    while source.token().await.unwrap() == first {
        assert!(first.issue_time.elapsed().unwrap() < Duration::from_secs(20), "no successor");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(first.refresh_time.elapsed().is_ok(), "asked again before refresh_time");
    let _ = fs::remove_file(file);
    let calls = calls.lock().unwrap();
    let want = [("WatchToken", "first"), ("IssueToken", "first"), ("WatchToken", "second"), ("IssueToken", "second")];
    for (call, (method, token)) in calls.iter().zip(want) {
        assert_eq!(*call, (method.to_owned(), format!("Bearer {token}")));
    }
    assert!(calls.len() >= want.len(), "{calls:?}");
}

#[tokio::test]
async fn after_a_final_end_it_tries_again_at_refresh_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let calls = Calls::default();
    tokio::spawn(serve(listener, calls.clone(), true));
    let config =
        Config { address, ca: None, certificate: None, private_key: None, token_file: None, ..Config::new("invoices") };
    let source = TokenSource::new(config).unwrap();
    let first = source.token().await.unwrap();
    while calls.lock().unwrap().len() < 2 {
        assert!(first.issue_time.elapsed().unwrap() < Duration::from_secs(20), "no second stream, though nobody asks");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(first.refresh_time.elapsed().is_ok(), "tried again before refresh_time");
    while source.token().await.unwrap() == first {
        assert!(first.issue_time.elapsed().unwrap() < Duration::from_secs(20), "no successor");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
