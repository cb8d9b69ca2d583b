//! Sends migrations to a collector of OpenTelemetry's, without ever keeping the recorder waiting.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use async_trait::async_trait;
use futures_executor::block_on;
use opentelemetry::KeyValue;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, Protocol, SpanExporter, WithExportConfig, WithHttpConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use thiserror::Error;
use ureq::Agent;

use super::metrics::Metrics;
use crate::analysis::Migration;
use crate::export::otlp;

/// So many migrations wait for a slow collector; more are counted and dropped.
const WAITING: usize = 16;

/// A collector that does not answer within this is given up for this migration.
const ANSWER: Duration = Duration::from_secs(10);

/// More bytes of an answer than this are not read.
const ANSWER_BYTES: u64 = 64 * 1024;

/// Where collectors take traces.
const PATH: &str = "/v1/traces";

/// Why nothing can be sent.
#[derive(Debug, Error)]
pub enum Error {
    /// The address is of another kind.
    #[error(
        "--otlp {0}: give http://HOST:PORT, of a collector that takes OTLP over HTTP without TLS"
    )]
    Address(String),
    /// The exporter refuses to be made.
    #[error("--otlp {0}")]
    Exporter(String, #[source] ExporterBuildError),
    /// There is no thread for it.
    #[error("cannot start the thread that sends traces")]
    Thread(#[source] std::io::Error),
}

/// The way to a collector.
#[derive(Debug)]
pub struct Traces {
    queue: SyncSender<Vec<SpanData>>,
    sender: JoinHandle<()>,
    metrics: Metrics,
}

impl Traces {
    /// Goes to the collector at `url`, which need not be there yet. Counts into `metrics`.
    ///
    /// # Errors
    /// [`enum@Error`], all of which are of this side.
    pub fn start(url: &str, metrics: &Metrics) -> Result<Self, Error> {
        let exporter = exporter(url)?;
        let (queue, waiting) = sync_channel(WAITING);
        let counted = metrics.clone();
        let sender = thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || send(&exporter, &waiting, &counted))
            .map_err(Error::Thread)?;
        Ok(Self {
            queue,
            sender,
            metrics: metrics.clone(),
        })
    }

    /// Has a migration sent, or counts it as dropped.
    pub(super) fn migrated(&self, migration: &Migration<'_>) {
        match self.queue.try_send(otlp::spans(migration)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.metrics.traced("dropped");
            }
        }
    }

    /// Waits until all is sent or given up.
    pub(super) fn finish(self) {
        drop(self.queue);
        // A panic of that thread has been printed, and there is nothing left to be sent.
        let _ = self.sender.join();
    }
}

fn exporter(url: &str) -> Result<SpanExporter, Error> {
    let refused = || Error::Address(url.to_owned());
    let rest = url.strip_prefix("http://").ok_or_else(refused)?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() {
        return Err(refused());
    }
    let endpoint = if path.is_empty() {
        format!("http://{host}{PATH}")
    } else {
        url.to_owned()
    };
    let agent = Agent::config_builder()
        .timeout_global(Some(ANSWER))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build();
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client(agent.into()))
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(endpoint)
        .with_timeout(ANSWER)
        .build()
        .map_err(|source| Error::Exporter(url.to_owned(), source))?;
    let resource = Resource::builder_empty()
        .with_service_name("blackout")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    exporter.set_resource(&resource);
    Ok(exporter)
}

fn send(exporter: &SpanExporter, waiting: &Receiver<Vec<SpanData>>, metrics: &Metrics) {
    for spans in waiting {
        match block_on(exporter.export(spans)) {
            Ok(()) => metrics.traced("sent"),
            Err(error) => {
                eprintln!("blackout: a migration's trace was not sent: {error}");
                metrics.traced("failed");
            }
        }
    }
}

/// HTTP for the exporter. Its thread has nothing else to do while it waits.
#[derive(Debug)]
struct Client(Agent);

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let request = Request::from_parts(parts, body.to_vec());
        let (parts, mut body) = self.0.run(request)?.into_parts();
        let bytes = body.with_config().limit(ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(parts, Bytes::from(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_addresses_are_refused_by_name() {
        for url in [
            "https://127.0.0.1:4318",
            "127.0.0.1:4318",
            "http://",
            "http:///v1",
        ] {
            let error = Traces::start(url, &Metrics::default()).unwrap_err();
            assert!(error.to_string().contains(url), "{error}");
        }
        let traces = Traces::start("http://127.0.0.1:1", &Metrics::default()).unwrap();
        traces.finish();
    }
}
