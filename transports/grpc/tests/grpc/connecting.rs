//! Finding a server, and what is said when there is none.

use r3map_core::ErrorKind;
use r3map_grpc::Target;

use crate::common::{connect_error, settings};

/// The message is one line and has all of these words.
fn says(error: &r3map_core::Error, words: &[&str]) {
    let text = error.to_string();
    assert!(!text.contains('\n') && words.iter().all(|word| text.contains(word)), "{text}");
}

#[tokio::test]
async fn nobody_there_is_one_line_with_the_address() {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target: Target = socket.local_addr().unwrap().to_string().parse().unwrap();
    drop(socket);
    let error = connect_error(&target, settings()).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    says(&error, &["cannot connect to", &target.to_string(), "refused"]);
}
