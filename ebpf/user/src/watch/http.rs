//! `/metrics` over HTTP, for a scraper.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread;

use tiny_http::{Header, Method, Response, Server};

use super::metrics::Metrics;

const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Hands the metrics out by `listener` from a thread of its own, as long as the process lives. Gives the
/// address that it listens at.
///
/// # Errors
/// When no thread can be started.
pub fn serve(listener: TcpListener, metrics: Metrics) -> io::Result<SocketAddr> {
    let at = listener.local_addr()?;
    let server = Server::from_listener(listener, None).map_err(io::Error::other)?;
    thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            for request in server.incoming_requests() {
                let path = request.url().split('?').next().unwrap_or_default();
                let response = match (request.method(), path) {
                    (Method::Get, "/metrics") => {
                        let response = Response::from_string(metrics.text());
                        match Header::from_bytes("Content-Type", TYPE) {
                            Ok(header) => response.with_header(header),
                            Err(()) => response,
                        }
                    }
                    (Method::Get, _) => {
                        Response::from_string("see /metrics\n").with_status_code(404)
                    }
                    _ => Response::from_string("GET only\n").with_status_code(405),
                };
                // A scraper that went away asks again.
                let _ = request.respond(response);
            }
        })?;
    Ok(at)
}
