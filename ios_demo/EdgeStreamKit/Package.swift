// swift-tools-version: 6.0
// Apple: the XCFramework that native/build-xcframework.sh puts beside this file.
// Linux (tests, edge-chat): the libraries that `make build` leaves in edge_stream/lib of this checkout.
import PackageDescription

#if os(Linux)
    let libraries = Context.environment["EDGE_STREAM_LIB"] ?? Context.packageDirectory + "/../../edge_stream/lib"
    let engine: Target = .systemLibrary(name: "CEdgeStream")
    let linking: [LinkerSetting] = [.unsafeFlags(["-L\(libraries)", "-Xlinker", "-rpath", "-Xlinker", libraries])]
#else
    let engine: Target = .binaryTarget(name: "CEdgeStream", path: "CEdgeStream.xcframework")
    let linking: [LinkerSetting] = []
#endif

let package = Package(
    name: "EdgeStreamKit",
    defaultLocalization: "en",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "EdgeStreamKit", targets: ["EdgeStreamKit"]),
        .library(name: "ChatCore", targets: ["ChatCore"]),
        .library(name: "ChatUI", targets: ["ChatUI"]),
        .executable(name: "edge-chat", targets: ["edge-chat"]),
    ],
    targets: [
        engine,
        .target(name: "EdgeStreamKit", dependencies: ["CEdgeStream"], linkerSettings: linking),
        .target(name: "ChatCore"),
        .target(name: "ChatUI", dependencies: ["EdgeStreamKit", "ChatCore"], resources: [.process("Resources")]),
        .target(name: "DemoModel"),
        .executableTarget(name: "edge-chat", dependencies: ["EdgeStreamKit", "DemoModel"]),
        .testTarget(name: "EdgeStreamKitTests", dependencies: ["EdgeStreamKit", "DemoModel", "edge-chat"]),
        .testTarget(name: "ChatCoreTests", dependencies: ["ChatCore"]),
        .testTarget(name: "ChatUITests", dependencies: ["ChatUI", "DemoModel"]),
    ],
    swiftLanguageModes: [.v6]
)
