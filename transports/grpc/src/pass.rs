//! What a leecher shows with each request, in headers, and what a server finds there: the secret that the seeder may ask
//! for, and the migration that a read is made for.
//!
//! The secret is where gRPC has credentials, so that programs in other languages can show it by their usual means.

use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue};

const MIGRATION: HeaderName = HeaderName::from_static("r3map-migration-bin");
const SCHEME: &str = "Bearer ";

/// Whoever sends headers in base64 may leave the padding out, says gRPC.
static BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What one leecher shows.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    secret: Option<HeaderValue>,
    migration: Mutex<Option<HeaderValue>>,
}

impl Pass {
    /// With this secret, if it is one.
    pub(crate) fn new(secret: &[u8]) -> Self {
        let value = (!secret.is_empty()).then(|| value(format!("{SCHEME}{}", BASE64.encode(secret)))).flatten();
        let secret = value.map(|mut value| {
            // Neither printed nor kept in tables of the connection.
            value.set_sensitive(true);
            value
        });
        Self { secret, migration: Mutex::default() }
    }

    /// Reads are made for this migration from now on.
    pub(crate) fn read_for(&self, id: [u8; 16]) {
        *self.migration.lock().unwrap_or_else(PoisonError::into_inner) = value(BASE64.encode(id));
    }

    /// Shows it with a request.
    pub(crate) fn show(&self, headers: &mut HeaderMap) {
        if let Some(secret) = &self.secret {
            headers.insert(AUTHORIZATION, secret.clone());
        }
        if let Some(migration) = &*self.migration.lock().unwrap_or_else(PoisonError::into_inner) {
            headers.insert(MIGRATION, migration.clone());
        }
    }
}

fn value(text: String) -> Option<HeaderValue> {
    HeaderValue::try_from(text).ok()
}

/// The secret that a request shows; empty if it shows none.
pub(crate) fn secret(headers: &HeaderMap) -> Vec<u8> {
    let shown = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|text| BASE64.decode(text.strip_prefix(SCHEME)?).ok());
    shown.unwrap_or_default()
}

/// The migration that a read is made for, if it says so.
pub(crate) fn migration(headers: &HeaderMap) -> Option<[u8; 16]> {
    BASE64.decode(headers.get(MIGRATION)?).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_found_and_what_is_no_pass_is_none() {
        let mut headers = HeaderMap::new();
        Pass::new(b"").show(&mut headers);
        assert!(headers.is_empty() && secret(&headers).is_empty() && migration(&headers).is_none());
        let pass = Pass::new(&[0, 255, b'a', 7]);
        for id in [[1; 16], [200; 16]] {
            pass.read_for(id);
            pass.show(&mut headers);
            assert_eq!((secret(&headers), migration(&headers)), (vec![0, 255, b'a', 7], Some(id)));
        }
        assert!(!format!("{pass:?} {headers:?}").contains("Bearer"), "it is not printed");
        for wrong in ["Bearer", "Bearer ?", "Basic AAAA", "Bearer  AAAA", "\u{ff}"] {
            headers.insert(AUTHORIZATION, HeaderValue::from_bytes(wrong.as_bytes()).unwrap());
            assert!(secret(&headers).is_empty(), "{wrong}");
        }
        for wrong in ["", "AAAA", "?"] {
            headers.insert(MIGRATION, HeaderValue::from_static(wrong));
            assert_eq!(migration(&headers), None, "{wrong}");
        }
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Bearer YQ"));
        assert_eq!(secret(&headers), b"a", "without padding");
    }
}
