//! What is kept decoded, and for how long.

use super::*;

#[tokio::test]
async fn an_event_that_is_no_longer_fresh_tells_the_same() {
    let config = CacheConfig {
        fresh: Duration::ZERO,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let (_, mut events) = world.cache.reader::<Pod>().events();
    world.put("a", "1").await;
    world.put("a", "2").await;
    world.commit([delete("a")]).await;
    let last = world.put("b", "1").await;
    world.cache.wait_for(last).await;
    let told = take(&mut events, 4).await;
    assert_eq!(told, ["+a=1@1", "~a=2<1@2", "-a@3", "+b=1@4"]);
}
