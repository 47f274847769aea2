//! `orlop-control`: the control plane's program.

#[cfg(feature = "jemalloc")]
mod allocator;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use hyper_util::rt::TokioIo;
use orlop_control::{config::Config, panics, run, server};
use orlop_proto::cluster::v1::{CreateTokenRequest, RevokeTokenRequest, join_client::JoinClient};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Orlop's control plane. Without a subcommand it serves.
#[derive(Debug, Parser)]
#[command(name = "orlop-control", version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/orlop/control.toml")]
    config: PathBuf,
    /// A TLS listener, instead of the configuration's `listen`; may be given several times.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<std::net::SocketAddr>,
    /// Logs as JSON lines.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join tokens, through the unix socket of the control plane that runs on this machine.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Prints a new token.
    Create {
        /// How long it is good for: "1h", "30m"; a second at least.
        #[arg(long, default_value = "1h", value_parser = lifetime)]
        ttl: jiff::SignedDuration,
        /// How many nodes may join with it; 0: no limit.
        #[arg(long, default_value_t = 0)]
        uses: u32,
    },
    /// Makes a token worthless. What has joined with it stays.
    Revoke {
        /// The token's second part.
        id: String,
    },
}

/// In whole seconds, as it travels: less than one would read as "not given".
fn lifetime(text: &str) -> Result<jiff::SignedDuration, String> {
    let lifetime: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    if lifetime.as_secs() < 1 {
        return Err("must be at least a second".to_owned());
    }
    Ok(lifetime)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log_to_stderr(arguments.json);
    panics::end_the_process();
    // Several TLS providers in one process would each have to be named everywhere; there is one.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::error!("another TLS provider is installed");
        return ExitCode::FAILURE;
    }
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %format_args!("{error:#}"), "orlop-control failed");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> Result<()> {
    let mut config = Config::load(&arguments.config).context("configuration")?;
    if !arguments.listen.is_empty() {
        config.listen = arguments.listen;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("runtime")?;
    match arguments.command {
        Some(Command::Token(command)) => runtime.block_on(token(&config, command)),
        None => {
            let result = runtime.block_on(serve(config));
            // What still runs holds nothing that matters: the store has been closed.
            runtime.shutdown_timeout(Duration::from_secs(2));
            result
        }
    }
}

async fn serve(config: Config) -> Result<()> {
    raise_file_limit();
    let inherited = server::inherited().context("LISTEN_FDS")?;
    let shutdown = CancellationToken::new();
    let signals = shutdown.clone();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM"),
            _ = interrupt.recv() => tracing::info!("SIGINT"),
        }
        signals.cancel();
    });
    run::run(config, inherited, shutdown).await.context("control")
}

async fn token(config: &Config, command: TokenCommand) -> Result<()> {
    let mut client = JoinClient::new(connect(config).await?);
    match command {
        TokenCommand::Create { ttl, uses } => {
            let request = CreateTokenRequest {
                ttl_seconds: ttl.as_secs(),
                uses,
            };
            println!("{}", client.create_token(request).await?.into_inner().token);
        }
        TokenCommand::Revoke { id } => {
            client.revoke_token(RevokeTokenRequest { id }).await?;
        }
    }
    Ok(())
}

async fn connect(config: &Config) -> Result<Channel> {
    let path = config.unix_socket.clone();
    anyhow::ensure!(
        !path.as_os_str().is_empty(),
        "unix_socket is switched off in the configuration"
    );
    let shown = path.display().to_string();
    // The address is not used: the connector knows the path.
    let endpoint = Endpoint::from_static("http://control").connect_timeout(Duration::from_secs(5));
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connect to {shown}"))
}

/// Every connection is a descriptor: take as many as we may.
fn raise_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live rlimit, which the call only writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return;
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a live rlimit, which the call only reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "the limit of open files stays");
    }
}

fn log_to_stderr(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    if json {
        registry
            .with(tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr))
            .init();
    } else {
        registry
            .with(
                tracing_subscriber::fmt::layer()
                    .with_ansi(false)
                    .with_writer(std::io::stderr),
            )
            .init();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lives_a_second_at_least() {
        let create = |ttl: &str| Arguments::try_parse_from(["orlop-control", "token", "create", "--ttl", ttl]);
        for ttl in ["500ms", "0s", "999ms", "1s ago", "soon"] {
            assert!(create(ttl).is_err(), "{ttl}");
        }
        for ttl in ["1s", "1500ms", "1h 30m"] {
            assert!(create(ttl).is_ok(), "{ttl}");
        }
    }
}
